"""Settings: every mistake is one clear line."""

from typing import Any

import pytest

from cluster.config import BatchConfig, Config, ConfigError, batch_settings, from_mapping, parse_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("512MB", 512 * 10**6),
        ("1.5g", 1_500_000_000),
        ("2000000", 2000000),
        (" 1 KiB ", 1024),
        (7, 7),
    ],
)
def test_parse_bytes(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "4 parsecs", "-1g", "1e9", "4i", "1.g", "0x10"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)


def test_plain_values_become_a_config() -> None:
    config = from_mapping(
        {"model": "org/name/", "kv_memory": "1KiB", "request_timeout_s": 5, "threads": None, "batching": "static"}
    )
    assert (config.kv_memory, config.request_timeout_s, config.threads, config.batching) == (1024, 5.0, None, "static")
    assert isinstance(config.request_timeout_s, float)
    assert config.model_name == "name"
    assert from_mapping({"model": "m", "served_model_name": "x"}).model_name == "x"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "model is missing"),
        ({"model": None}, "model is missing"),
        ({"model": ""}, "model is empty"),
        ({"model": 3}, "model is 3, but must be str"),
        ({"model": "m", "modle": 1}, "unknown setting 'modle'"),
        ({"model": "m", "port": "80"}, "port is '80', but must be int"),
        ({"model": "m", "port": 70000}, "port is 70000"),
        ({"model": "m", "grpc_port": -1}, "grpc_port is -1"),
        ({"model": "m", "port": 9000}, "grpc_port and port are both 9000"),
        ({"model": "m", "port": True}, "port is True, but must be int"),
        ({"model": "m", "threads": 0}, "threads is 0"),
        ({"model": "m", "max_model_len": "x"}, "max_model_len is 'x', but must be int"),
        ({"model": "m", "kv_memory": "0.5"}, "kv_memory is 0"),
        ({"model": "m", "kv_memory": "much"}, "no amount of memory"),
        ({"model": "m", "step_timeout_s": 0}, "step_timeout_s is 0"),
        ({"model": "m", "step_timeout_s": float("nan")}, "step_timeout_s is nan"),
        ({"model": "m", "batching": "dynamic"}, "batching is 'dynamic'; choose one of continuous, static, static-skip"),
        ({"model": "m", "batching": ["static"]}, "batching is"),
        ({"model": "m", "max_queue": 0}, "max_queue is 0"),
        ({"model": "m", "host_kv_memory": -1}, "host_kv_memory is -1"),
        ({"model": "m", "host_kv_memory": "1GB", "prefix_cache": "off"}, "host_kv_memory is for KV of the prefix cache"),
        ({"model": "m", "host_kv_memory": "1GB", "batching": "static"}, "host_kv_memory is for KV of the prefix cache"),
        ({"model": "m", "max_num_seqs": 600}, "max_num_batched_tokens"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping(values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{"num_blocks": 1}, {"block_size": 0}, {"pp": 0}, {"max_num_seqs": 9, "max_num_batched_tokens": 8}, {"max_model_len": 0}],
)
def test_a_batch_settings_that_cannot_work(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        BatchConfig(**{"num_blocks": 10, "max_model_len": 10} | values)


def test_the_batchers_part() -> None:
    config = Config("m", block_size=4, max_num_seqs=3, reservation="contiguous", max_model_len=1000)
    batch = batch_settings(config, num_blocks=11, max_model_len=30)
    assert (batch.host_blocks, batch_settings(config, 11, 30, 5).host_blocks) == (0, 5)
    assert (batch.block_size, batch.max_num_seqs, batch.reservation, batch.max_model_len) == (4, 3, "contiguous", 30)
    assert (batch.pool_tokens, batch.max_sequence_tokens) == (40, 30)
    assert BatchConfig(num_blocks=3, max_model_len=100).max_sequence_tokens == 32


def test_the_digest_is_of_what_engines_work_by() -> None:
    config = Config("m")
    edge = {
        "name": "x",
        "route_prefix": "/x",
        "host": "h",
        "port": 1,
        "routers": 2,
        "served_model_name": "s",
        "request_timeout_s": 1.0,
    }
    assert Config("m", **edge).digest == config.digest  # type: ignore[arg-type]
    others = [
        Config("n"),
        Config("m", engines=2),
        Config("m", threads=1),
        Config("m", max_queue=3),
        Config("m", step_timeout_s=1.0),
    ]
    assert len({config.digest, *(other.digest for other in others)}) == 6
    assert len(config.digest) == 8


@pytest.mark.parametrize(("name", "value"), [("name", "a b"), ("name", ""), ("route_prefix", "x"), ("route_prefix", "/x/")])
def test_names_that_serve_would_not_take(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"):
        from_mapping({"model": "m", name: value})


@pytest.mark.parametrize(("value", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off")])
def test_on_and_off_are_read_as_yaml_reads_them(value: object, read: str) -> None:
    assert from_mapping({"model": "m", "prefix_cache": value}).prefix_cache == read


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_other_words_than_on_and_off_are_mistakes(value: object) -> None:
    if value is None:
        assert from_mapping({"model": "m", "prefix_cache": value}).prefix_cache == "on"
        return
    with pytest.raises(ConfigError, match="prefix_cache"):
        from_mapping({"model": "m", "prefix_cache": value})
