"""cluster/aws-account.yaml: the profiles that cluster/gpu.yaml names, and no more rights than it needs."""

from __future__ import annotations

from pathlib import Path

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


class Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short functions, read as {name: value}."""


for _name in ("Ref", "GetAtt", "Sub"):
    Loader.add_constructor(f"!{_name}", lambda loader, node, name=_name: {name: loader.construct_scalar(node)})


def resources():
    return yaml.load((CLUSTER / "aws-account.yaml").read_text(), Loader=Loader)["Resources"]


def test_every_reference_is_there():
    template = yaml.load((CLUSTER / "aws-account.yaml").read_text(), Loader=Loader)
    known = {*template["Resources"], *template["Parameters"]}

    def references(value):
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("Ref", "GetAtt"):
                    yield item.split(".")[0]
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    assert {*references(template)} <= known


def test_the_profiles_are_those_of_the_cluster_file():
    made = {
        item["Properties"]["InstanceProfileName"]
        for item in resources().values()
        if item["Type"] == "AWS::IAM::InstanceProfile"
    }
    nodes = yaml.safe_load((CLUSTER / "gpu.yaml").read_text())["available_node_types"].values()
    assert {node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes} == made


def test_workers_may_use_the_bucket_and_nothing_else():
    found = resources()
    assert "Policies" not in found["WorkerRole"]["Properties"]
    assert found["WorkerRole"]["Properties"]["ManagedPolicyArns"] == [{"Ref": "BucketAccess"}]
    statements = found["BucketAccess"]["Properties"]["PolicyDocument"]["Statement"]
    assert all(action.startswith("s3:") for statement in statements for action in statement["Action"])
    assert all("Bucket" in str(statement["Resource"]) for statement in statements)
    (passed,) = [
        statement
        for statement in found["HeadRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
        if statement["Action"] == "iam:PassRole"
    ]
    assert passed["Resource"] == {"GetAtt": "WorkerRole.Arn"}


def test_results_outlive_the_stack():
    assert resources()["Bucket"]["DeletionPolicy"] == "Retain"
