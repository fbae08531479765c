"""The manifests for KubeRay; tests/cluster/test_jobs.py deploys the Serve section to a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayvaec.serving.autoscaling import replica_range
from rayvaec.serving.deployment import ServeArgs, build
from rayvaec.serving.middleware.load_shedding import environment

FOLDER = Path(__file__).parents[2] / "jobs" / "kuberay"
NAMES = ("service", "train", "sample")


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def cluster(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec["rayClusterConfig" if name == "service" else "rayClusterSpec"]


def pods(name: str) -> list[dict[str, Any]]:
    """The pod specs of head and workers."""
    groups = [cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_serve_section_fits_serves_schema_and_the_builder() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(manifest("service")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert set(config) <= set(ServeDeploySchema.model_fields)  # unknown keys pass otherwise
    assert set(config["http_options"]) <= set(type(schema.http_options).model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)
    args = ServeArgs.model_validate(application.args)
    deployment = build(args)._bound_deployment
    worker = cluster("service")["workerGroupSpecs"][0]
    (container,) = worker["template"]["spec"]["containers"]
    # A replica fills a pod, and Serve never asks for more pods than there may be.
    assert args.cpus_per_replica == float(container["resources"]["requests"]["cpu"])
    assert replica_range(args.num_replicas) == (worker["minReplicas"], worker["maxReplicas"])
    # A pod that goes is given as long as Serve gives a replica.
    grace = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= deployment._deployment_config.graceful_shutdown_timeout_s


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_kuberay_reads(name: str) -> None:
    import ray

    top = manifest(name)
    assert top["apiVersion"] == "ray.io/v1"
    assert top["kind"] == ("RayService" if name == "service" else "RayJob")
    spec = cluster(name)
    known = {"rayVersion", "authOptions", "enableInTreeAutoscaling"}
    assert set(spec) == {*known, "headGroupSpec", "workerGroupSpecs"}
    assert spec["rayVersion"] == ray.__version__
    assert f"RAY={ray.__version__}-py311" in (FOLDER / "Dockerfile").read_text()
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", NAMES)
def test_pods_have_one_image_resources_and_what_they_mount(name: str) -> None:
    images = set()
    for pod in pods(name):
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(isinstance(entry["value"], str) for entry in container["env"])
        assert not any("TOKEN" in entry["name"] for entry in container["env"])
    assert len(images) == 1


def test_the_endpoints_token_is_a_secret_that_is_mounted_where_it_is_looked_for() -> None:
    config = yaml.safe_load(manifest("service")["spec"]["serveConfigV2"])
    args = config["applications"][0]["args"]
    for pod in pods("service"):
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["token"]["readOnly"]
        assert mounts["token"]["mountPath"] + "/token" == args["token_file"]
        assert args["model"].startswith(mounts["storage"]["mountPath"] + "/")
        (secret,) = (v["secret"] for v in pod["volumes"] if v["name"] == "token")
        assert f"secret generic {secret['secretName']}" in (FOLDER / "service.yaml").read_text()


def test_traffic_waits_for_readiness() -> None:
    config = yaml.safe_load(manifest("service")["spec"]["serveConfigV2"])
    _, worker = pods("service")
    probe = worker["containers"][0]["readinessProbe"]["httpGet"]
    assert probe == {"path": "/readyz", "port": config["http_options"]["port"]}


def test_the_proxies_pass_on_what_all_replicas_have_places_for() -> None:
    config = yaml.safe_load(manifest("service")["spec"]["serveConfigV2"])
    args = ServeArgs.model_validate(config["applications"][0]["args"])
    _, most = replica_range(args.num_replicas)
    expected = environment(most * args.limits.max_requests)
    for pod in pods("service"):
        given = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["train", "sample"])
def test_entrypoints_are_commands_that_exist(name: str) -> None:
    from rayvaec.cli import build_parser

    spec = manifest(name)["spec"]
    command, *words = spec["entrypoint"].split()
    arguments = build_parser().parse_args(words)
    assert command == "rayvaec"
    assert words[0] == name
    (worker,) = cluster(name)["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    each = container["resources"]["limits"]
    assert int(given["RAYVAEC_MAX_CPUS"]) == worker["maxReplicas"] * int(each["cpu"])
    _, most = replica_range(arguments.num_workers)
    assert most <= worker["maxReplicas"]
    if arguments.use_gpu:
        gpus = worker["maxReplicas"] * int(each["nvidia.com/gpu"])
        assert int(given["RAYVAEC_MAX_GPUS"]) == gpus
