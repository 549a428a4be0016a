"""What others put into their CI: the Action's own steps, the snippets, the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from converter.cli import project_settings
from converter.project import read_project

ROOT = Path(__file__).resolve().parent.parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


class Job:
    """Runs the steps of the Action as GitHub does, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {}
        self.summary = ""

    def run(self, **inputs: str) -> subprocess.CompletedProcess[str]:
        """Run all steps whose condition holds; the last one's result."""
        known = {name: str(each.get("default", "")) for name, each in ACTION["inputs"].items()}
        assert set(inputs) <= set(known)
        known.update(inputs)
        output, summary = self.folder / "output.txt", self.folder / "summary.md"
        for path in (output, summary):
            path.unlink(missing_ok=True)
        done = None
        for step in ACTION["runs"]["steps"]:
            if not _holds(step.get("if", ""), known):
                continue
            environment = {
                **os.environ,
                **{name: _filled(text, known) for name, text in step["env"].items()},
                "PATH": f"{self._programs()}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
            }
            assert "${{" not in step["run"], "inputs in a script could be run as code"
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                break
        assert done is not None
        lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
        self.outputs = dict(line.split("=", 1) for line in lines)
        self.summary = summary.read_text(encoding="utf-8") if summary.is_file() else ""
        return done

    def _programs(self) -> Path:
        """Give a folder in which `python` and `twofold` are those of these tests."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name, call in (("python", ""), ("twofold", "-m converter")):
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        return folder


def _filled(text: str, inputs: Mapping[str, str]) -> str:
    filled = re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: inputs[found[1]], str(text))
    return filled.replace("${{ github.action_path }}", str(ROOT))


def _holds(condition: str, inputs: Mapping[str, str]) -> bool:
    if not condition:
        return True
    found = re.fullmatch(r"inputs\.(\w+) == '(\w+)'", condition)
    assert found is not None, condition
    return inputs[found[1]] == found[2]


def project(folder: Path, shared: Path, network: str = "resnet20") -> Path:
    """Write a project that converts a reference model quickly, with a few real images, and its gates."""
    for source in ("calib", "val"):
        for images in (shared / "data/cifar10" / source).glob("*/"):
            (folder / source / images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[:8]:
                shutil.copy(image, folder / source / images.name)
    macs, megabytes, preparation = REFERENCE[network]
    path = folder / "twofold.toml"
    path.write_text(
        f"""
        model = "{shared}/models/{network}_cifar10.onnx"
        calib = "calib"
        out = "fast.onnx"
        solver = "data-svd"
        schemes = "channel"

        [budget]
        macs = {macs}

        [preprocessing]
        {preparation}

        [running]
        images = 40
        patches = 256
        threads = 1
        timing = false

        [gates]
        data = "val"
        seconds = 0.2
        min_macs_reduction = {0.99 * macs}
        max_file_mb = {megabytes}
        max_accuracy_drop = 5
        min_agreement = 85
        """,
        encoding="utf-8",
    )
    return path


CIFAR10 = 'preset = "cifar10"'
IMAGENET = "mean = [0.485, 0.456, 0.406]\n        std = [0.229, 0.224, 0.225]"
REFERENCE = {
    "resnet20": (1.3, 1.0, IMAGENET),
    "alexnet": (2.0, 8.0, CIFAR10),
    "googlenet": (1.5, 15.0, CIFAR10),
    "vgg16": (2.0, 15.0, CIFAR10),
}
"""By network: how many times fewer multiply-accumulates, the most megabytes, and how images are prepared."""


def test_the_action_on_a_reference_model(tmp_path: Path, shared: Path) -> None:
    project(tmp_path, shared)
    job = Job(tmp_path)
    done = job.run(install="false", gates="max_latency_ms=1e6\n\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "fast.onnx").is_file()
    assert (tmp_path / job.outputs["report"]).is_file()
    assert (tmp_path / job.outputs["junit"]).is_file()
    assert float(job.outputs["speedup"]) > 0
    assert set(job.outputs) == set(ACTION["outputs"])
    assert "all gates passed" in job.summary
    assert "max_latency_ms" in done.stdout

    judged = job.run(
        install="false",
        command="check",
        model=f"{shared}/models/resnet20_cifar10.onnx",
        converted="fast.onnx",
        data="val",
        gates="max_file_mb=0.1",
        options="--seconds\n0.1\n--preset\ncifar10",
    )
    assert judged.returncode == 1
    assert "1 of 5 gates failed; max_file_mb failed" in judged.stderr
    assert "1 of 5 gates failed" in job.summary
    assert float(job.outputs["speedup"]) > 0


def test_the_action_says_what_is_wrong(tmp_path: Path) -> None:
    job = Job(tmp_path)
    missing = job.run(install="false")
    assert missing.returncode == 2
    assert "twofold init" in missing.stderr
    assert job.outputs == {}
    assert job.run(install="false", command="rm").returncode == 2
    hostile = job.run(install="false", gates='$(touch hit)"; touch hit; "')
    assert hostile.returncode == 2
    assert not (tmp_path / "hit").exists()


def test_the_action_installs_itself() -> None:
    first = ACTION["runs"]["steps"][0]
    assert first["if"] == "inputs.install == 'true'"
    assert ACTION["inputs"]["install"]["default"] == "true"
    assert _filled(first["env"]["SOURCE"], {}) == str(ROOT)
    assert (ROOT / "constraints.txt").is_file()


def test_the_example_workflow_names_inputs_of_the_action() -> None:
    workflow = yaml.safe_load((ROOT / "docs/ci/github.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["twofold"]["steps"]
    step = next(each for each in steps if "twofold@" in each.get("uses", ""))
    assert set(step["with"]) <= set(ACTION["inputs"])
    used = re.findall(r"steps\.twofold\.outputs\.(\w+)", str(steps))
    assert set(used) <= set(ACTION["outputs"])


def test_the_gitlab_job_runs_a_command_that_is_there(tmp_path: Path, shared: Path) -> None:
    job = yaml.safe_load((ROOT / "docs/ci/gitlab.yml").read_text(encoding="utf-8"))[".twofold"]
    (script,) = job["script"]
    project(tmp_path, shared)
    done = twofold(tmp_path, *script.split()[1:], "--quiet")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / job["artifacts"]["reports"]["junit"]).is_file()


@pytest.mark.parametrize("network", [name for name in REFERENCE if name != "resnet20"])
def test_reference_models_pass_their_gates(tmp_path: Path, shared: Path, network: str) -> None:
    """ResNet-20 does above, by the Action and by the GitLab job."""
    project(tmp_path, shared, network)
    done = twofold(tmp_path, "run", "--json", "verdict.json")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text(encoding="utf-8"))
    assert {each["name"] for each in verdict["gates"]} == {
        *("min_macs_reduction", "max_file_mb", "max_accuracy_drop", "min_agreement", "finite")
    }


def twofold(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "converter", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_image_is_built_of_files_that_are_there() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


@pytest.mark.parametrize("page", ["README.md", "docs/ci.md"])
def test_projects_in_the_docs_are_read(tmp_path: Path, page: str) -> None:
    found = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found
    for text in found:
        path = tmp_path / "twofold.toml"
        path.write_text(text, encoding="utf-8")
        assert read_project(path, project_settings())["gate"]
