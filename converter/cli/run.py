"""`twofold run`: a conversion and its verdict as `twofold.toml` says, whose keys are its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from converter.cli.convert import convert
from converter.cli.gating import GatesJson, Gating, Junit, config_option, judge
from converter.cli.groups import Preparation, Running
from converter.cli.options import TABLES
from converter.cli.outputs import check_outputs
from converter.cli.spreading import extending, group, grouped
from converter.cli.terminal import one_sentence
from converter.config import Target
from converter.project import PROJECT_FILE, Setting, settings_of

__all__ = ["project_settings", "run"]


def project_settings() -> tuple[Setting, ...]:
    """List what twofold.toml may hold: the options of `run`, in tables by their headings, and the gates."""
    return settings_of(run, TABLES)


@extending(convert)
@grouped
def run(
    *,
    asked: dict[str, Any],
    config: Annotated[Path, config_option(project_settings, required=True)] = Path(PROJECT_FILE),
    gating: Gating,
    json: GatesJson = None,
    junit: Junit = None,
) -> None:
    """Convert as twofold.toml says, and judge the result by its gates."""
    del config  # its values are the defaults of all that is here
    with one_sentence():
        gates, data = gating.asked(asked["val"])
        report = asked["report"] or asked["out"].with_suffix(".json")
        outputs = [report, asked["html"], json, junit]
        check_outputs(outputs, read=[asked["model"], asked["out"], asked["calib"], data])
    convert(**asked)
    with one_sentence():
        judge(
            asked["model"],
            asked["out"],
            data,
            gates,
            gating.seconds,
            preprocessing=group(Preparation, asked).preprocessing(data, quiet=True),
            target=Target(group(Running, asked).runtime(), asked["batch"]),
            json=json,
            junit=junit,
            html=asked["html"],
            report=report,
            quiet=asked["quiet"],
        )
