from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayvaec.serving.autoscaling import replica_range
from rayvaec.serving.deployment import ServeArgs
from rayvaec.serving.middleware.load_shedding import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def _start_commands(config: dict[str, Any]) -> list[str]:
    return config["head_start_ray_commands"] + config["worker_start_ray_commands"]


def _workers(config: dict[str, Any]) -> dict[str, Any]:
    types = config["available_node_types"]
    return {name: node for name, node in types.items() if name != config["head_node_type"]}


def test_fits_rays_own_schema(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_worker"]["max_workers"] == 4


def test_the_schema_check_can_fail(config: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = deepcopy(config)
    wrong["worker_start_commands"] = []
    with pytest.raises(ValidationError, match="worker_start_commands"):
        validate_config(prepare_config(wrong))


def test_head_has_no_gpu_and_workers_scale_from_zero_on_spot(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    for worker in _workers(config).values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_node_configs_hold_only_what_run_instances_takes(config: dict[str, Any]) -> None:
    known = {"InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings"}
    for node in config["available_node_types"].values():
        node_config = node["node_config"]
        assert known <= set(node_config) <= known | {"InstanceMarketOptions"}
        assert re.fullmatch(r"[a-z0-9]+\.[a-z0-9]+", node_config["InstanceType"])
        assert re.fullmatch(r"ami-[0-9a-f]+|resolve:ssm:/\S+", node_config["ImageId"])
        assert set(node_config["IamInstanceProfile"]) == {"Name"}
        (disk,) = node_config["BlockDeviceMappings"]
        assert set(disk) == {"DeviceName", "Ebs"}


def test_every_start_command_sets_token_authentication(config: dict[str, Any]) -> None:
    for command in _start_commands(config):
        settings, ray_command = command.split(";")[0], command.split("; ")[-1]
        assert ray_command.startswith("ray ")
        assert settings.startswith("export ")
        assert "RAY_AUTH_MODE=token" in settings.split()
        assert "RAY_AUTH_TOKEN_PATH=$HOME/rayvaec-token/token" in settings.split()
    assert any("chmod 600 ~/rayvaec-token/token" in c for c in config["setup_commands"])


def test_token_and_package_are_mounted_where_the_commands_look(config: dict[str, Any]) -> None:
    commands = " ".join([*config["setup_commands"], *_start_commands(config)])
    for remote in config["file_mounts"]:
        assert remote.removeprefix("~/") in commands
    assert not re.search(r"https?://|--index-url|--extra-index", commands)


def test_the_job_server_listens_on_loopback(config: dict[str, Any]) -> None:
    (start,) = (c for c in config["head_start_ray_commands"] if "--head" in c)
    assert "--dashboard-host=127.0.0.1" in start


def test_what_the_head_says_of_the_full_cluster_is_what_the_node_types_come_to(
    config: dict[str, Any],
) -> None:
    (start,) = (c for c in config["head_start_ray_commands"] if "--head" in c)
    said = dict(re.findall(r"RAYVAEC_MAX_(CPU|GPU)S=(\d+)", start))
    head = config["available_node_types"][config["head_node_type"]]["resources"]
    for kind in ("CPU", "GPU"):
        full = head.get(kind, 0) + sum(
            node["max_workers"] * node["resources"].get(kind, 0)
            for node in _workers(config).values()
        )
        assert int(said[kind]) == full


def test_the_proxies_pass_on_what_the_replicas_of_serve_yaml_have_places_for(
    config: dict[str, Any],
) -> None:
    served = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    args = ServeArgs.model_validate(served["applications"][0]["args"])
    _, most = replica_range(args.num_replicas)
    expected = environment(most * args.limits.max_requests)
    for start in (c for c in _start_commands(config) if "ray start" in c):
        settings = start.split(";")[0].split()
        assert {f"{name}={value}" for name, value in expected.items()} <= set(settings)


def test_storage_is_a_bucket_that_every_node_mounts(config: dict[str, Any]) -> None:
    starts = [c for c in _start_commands(config) if "ray start" in c]
    (place,) = {word for c in starts for word in c.split() if word.startswith("RAYVAEC_STORAGE=")}
    folder = place.removeprefix("RAYVAEC_STORAGE=").rstrip(";")
    (mount,) = (c for c in config["initialization_commands"] if "s3fs your-bucket" in c)
    assert f"s3fs your-bucket {folder} " in mount
    assert f"endpoint={config['provider']['region']}," in mount
    assert config["docker"]["run_options"] == [f"--volume={folder}:{folder}"]


def test_images_carry_the_ray_that_pyproject_asks_for(config: dict[str, Any]) -> None:
    import ray

    for key in ("image", "worker_image"):
        assert config["docker"][key].startswith(f"rayproject/ray:{ray.__version__}-py311")
