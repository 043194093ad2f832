"""Whether those who read the YAML files of examples/cluster/ would take them.

pip install skypilot kubeflow-trainer-api kubeflow-training && python -m tests.examples.schemas

Each file is read by the classes of the program that it is for, in an environment of its own: these
packages have requirements that others contradict. What they do not know, they drop without a word:
so what they give back must be all that is in the file.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

CLUSTER = Path(__file__).parent.parent.parent / "examples" / "cluster"


def missing(given, understood, place: str = "") -> list[str]:
    """The places in `given` that are not, or are something else, in `understood`."""
    if isinstance(given, dict) and isinstance(understood, dict):
        found = [f"{place}.{key}" for key in given if key not in understood]
        pairs = [(f".{key}", given[key], understood[key]) for key in given if key in understood]
    elif isinstance(given, list) and isinstance(understood, list):
        found = [place] if len(given) != len(understood) else []
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(given, understood, strict=False))]
    else:
        return [] if str(given) == str(understood) else [place]
    return found + [where for name, a, b in pairs for where in missing(a, b, place + name)]


def trainjob(given: dict):
    """As the models of Kubeflow Trainer's Python API understand it."""
    models = importlib.import_module("kubeflow_trainer_api.models")
    return models.TrainerV1alpha1TrainJob.from_dict(given).to_dict()


def pytorchjob(given: dict):
    """As the models of the Training Operator's Python API understand it."""
    operator = importlib.import_module("kubeflow.training.models")
    kubernetes = importlib.import_module("kubernetes.client")
    for name in dir(operator):  # where the client looks for classes by their name
        if name.startswith("Kubeflow"):
            setattr(kubernetes.models, name, getattr(operator, name))
    client = kubernetes.ApiClient()
    response = SimpleNamespace(data=json.dumps(given))
    return client.sanitize_for_serialization(
        client.deserialize(response, "KubeflowOrgV1PyTorchJob")
    )


def skypilot(given: dict):
    """SkyPilot itself refuses what it does not know."""
    task = importlib.import_module("sky").Task
    task.from_yaml_config(given, [("BUCKET", "my-runs"), ("TEXT", "s3://my/text.txt")])
    return given


def main() -> int:
    wrong = False
    for read in (trainjob, pytorchjob, skypilot):
        given = yaml.safe_load((CLUSTER / f"{read.__name__}.yaml").read_text(encoding="utf-8"))
        found = missing(given, read(given))
        print(
            f"{read.__name__}.yaml: {'not understood: ' * bool(found)}{', '.join(found) or 'good'}"
        )
        wrong |= bool(found)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
