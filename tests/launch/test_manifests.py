"""What other tools read: the manifests of ``launch/`` fit the schemas of these tools, unknown fields refused.

Needs the extra ``launch``: the schemas of Kubernetes (kubernetes-validate) and of SkyPilot.
"""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
JOBSET = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"network", "failurePolicy", "replicatedJobs"},
    "spec.network": {"enableDNSHostnames"},
    "spec.failurePolicy": {"maxRestarts", "rules"},
}  # of jobset.x-k8s.io/v1alpha2; the job inside is checked with Kubernetes' own schema


def jobset() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text().replace("NAME", "my-run"))


def test_the_job_in_the_jobset_fits_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    manifest = jobset()
    for path, keys in JOBSET.items():
        node = manifest
        for key in filter(None, path.split(".")):
            node = node[key]
        assert node.keys() <= keys
    [workers] = manifest["spec"]["replicatedJobs"]
    assert workers.keys() <= {"name", "replicas", "template"}
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "workers"}, "spec": workers["template"]["spec"],
    }  # fmt: skip
    validate.validate(job, "1.30", strict=True)
    broken = json.loads(json.dumps(job).replace("podFailurePolicy", "podFailurePolcy"))
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, "1.30", strict=True)


def test_the_processes_of_the_jobset_find_each_other() -> None:
    """The address is the first pod's, which JobSet names; the number of pods is that of processes."""
    manifest = jobset()
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["COORDINATOR"] == "my-run-workers-0-0.my-run:8476"
    assert int(env["HOSTS"]) == spec["completions"] == spec["parallelism"]
    assert container["command"][:2] == ["bash", "-c"] and container["command"][2].startswith(
        "exec "
    )


def test_the_task_fits_skypilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    config.pop("file_mounts")  # SkyPilot would look the bucket up
    task = sky.Task.from_yaml_config(copy.deepcopy(config))
    [resources] = task.resources
    assert task.num_nodes == 2 and resources.accelerators == {"H100": 8}
    assert resources.job_recovery["recover_on_exit_codes"] == [75, 143]
    config["resources"]["acceleratorss"] = 1
    with pytest.raises(ValueError, match="did you mean 'accelerators'"):
        sky.Task.from_yaml_config(config)


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_the_pod_gets_the_command_as_it_was_given(tmp_path: Path) -> None:
    """Through ssh and the worker's shell, with a gcloud that runs the command here."""
    (tmp_path / "gcloud").write_text(
        '#!/bin/sh\nfor a; do case $a in --command=*) sh -c "${a#--command=}";; esac; done\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    home = tmp_path / "mllm_act" / ".venv" / "bin"
    home.mkdir(parents=True)
    (home / "activate").touch()
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["printf", "<%s>", "a b", "it's", "$HOME", '"']
    done = subprocess.run(
        [str(LAUNCH / "tpu_pod.sh"), "pod", "zone", *command],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "<a b><it's><$HOME><\">"
    assert (tmp_path / "mllm_act.pid").read_text().strip().isdigit()
