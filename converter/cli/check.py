"""`twofold check`: a model that was converted earlier is judged by gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from converter.cli.gating import GatesJson, Gating, Junit, config_option, judge
from converter.cli.groups import Preparation, Running
from converter.cli.options import Batch, Quiet
from converter.cli.outputs import check_outputs
from converter.cli.run import project_settings
from converter.cli.spreading import grouped
from converter.cli.terminal import one_sentence
from converter.config import Target
from converter.project import PROJECT_FILE

__all__ = ["check"]


@grouped
def check(
    *,
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="The model to judge; the project's OUT.")
    ],
    against: Annotated[Path, typer.Option(help="The model as it was; the project's MODEL.")],
    config: Annotated[Path, config_option(project_settings, required=False)] = Path(PROJECT_FILE),
    gating: Gating,
    preparation: Preparation,
    running: Running,
    batch: Batch = Target.batch,
    json: GatesJson = None,
    junit: Junit = None,
    quiet: Quiet = False,
) -> None:
    """Judge a converted model by gates; exit code 1 where one does not hold."""
    del config  # its values are the defaults of all that is here
    with one_sentence():
        gates, data = gating.asked()
        check_outputs([json, junit], read=[against, converted, data])
        judge(
            against,
            converted,
            data,
            gates,
            gating.seconds,
            preprocessing=preparation.preprocessing(data, quiet=quiet),
            target=Target(running.runtime(), batch),
            json=json,
            junit=junit,
            quiet=quiet,
        )
