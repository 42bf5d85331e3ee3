"""What `evenkeel serve` reads, and how it is refused."""

import datetime
import random
import re
from pathlib import Path

import pytest
import yaml

from evenkeel.errors import ConfigurationError
from evenkeel.models import shipped
from evenkeel.schema import ProblemsError
from evenkeel.serving.config import SCHEMA, LossyConfig, NodesConfig, ServeConfig, load_raw, read_config
from evenkeel.serving.gateway.health import HealthSettings

TOP = sorted(SCHEMA.json_schema()["properties"])
INNER = [*dict.fromkeys(name for one in SCHEMA.json_schema()["$defs"].values() for name in one["properties"])]
ODD = [
    None, True, 0, -1, 10**400, 0.5, float("nan"), float("inf"), "", "auto", "5ms", "hedge", "a.json", "berrut:k=999",
    "tcp://h:1", "tcp://:70000", "http://u:p@h", "dns://x:1", "\0", "\ud800", b"x", datetime.date(2001, 1, 1),
    "9" * 5000,
]  # fmt: skip
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"


def test_nothing_said_is_the_embedded_pair() -> None:
    config = read_config({})
    assert config.card().name == "cifar10-base"
    assert [str(code.settings) for code in config.codes] == ["replicate", "collage", "collage"]
    assert config.host == ("127.0.0.1",)
    assert config.policy.name == "collage+hedge"


def test_another_classifier_has_no_collages_of_its_own() -> None:
    config = read_config({"model": str(shipped.card_path("cifar10-base"))})
    assert [str(code.settings) for code in config.codes] == ["replicate"]


def test_files_of_callables_are_relative_to_the_configuration(tmp_path: Path) -> None:
    codes = [{"kind": "collage", "model": "cifar10-collage-2x2", "run": "python:c.py:make"}]
    config = read_config({"run": "python:models/mine.py:make", "codes": codes}, tmp_path)
    assert config.run == f"python:{tmp_path}/models/mine.py:make"
    assert config.codes[0].run == f"python:{tmp_path}/c.py:make"
    assert read_config({"run": "python:/abs/mine.py:make"}, tmp_path).run == "python:/abs/mine.py:make"
    assert read_config({"run": "python:package.module:make"}, tmp_path).run == "python:package.module:make"


def test_a_byte_order_mark_is_no_field(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_bytes(b"\xef\xbb\xbfport: 81\n")
    assert read_config(load_raw(tmp_path / "serve.yaml")).port == 81


def test_no_message_holds_a_password() -> None:
    for raw in (["htp://admin:hunter2@host"], {"urls": ["ftp://admin:hunter2@host"]}):
        with pytest.raises(ConfigurationError, match="://host") as refusal:
            read_config({"replicas": raw})
        assert "hunter2" not in str(refusal.value)


def test_each_model_may_be_replaced_by_a_callable() -> None:
    codes = [{"kind": "collage", "model": "cifar10-collage-2x2", "run": "python:m:make_2x2"}, "cifar10-collage-3x3"]
    config = read_config({"run": "python:m:make", "codes": codes})
    assert (config.run, [code.run for code in config.codes]) == ("python:m:make", ["python:m:make_2x2", ""])


@pytest.mark.parametrize(
    ("entry", "text", "card"),
    [
        ("replicate", "replicate", None),
        ("replicate:k=3", "replicate:k=3", None),
        ("berrut:k=8,spares=2", "berrut:k=8,spares=2", None),
        ("cifar10-collage-2x2", "collage", shipped.card_path("cifar10-collage-2x2")),
        ("mine.json", "collage", Path("at/mine.json")),
        ({"kind": "collage:grid=2", "model": "mine.json"}, "collage:grid=2", Path("at/mine.json")),
        ({"kind": "cheap:k=3", "model": "mine.json"}, "cheap:k=3", Path("at/mine.json")),
        ({"kind": "parity:form=concat,k=4", "model": "mine.json"}, "parity:form=concat,k=4", Path("at/mine.json")),
        # Older spellings, which files of users hold.
        ({"kind": "replicate", "items": 3}, "replicate:k=3", None),
        ({"kind": "berrut", "items": 8, "spares": 2}, "berrut:k=8,spares=2", None),
        ({"kind": "cheap", "model": "mine.json"}, "cheap", Path("at/mine.json")),
        ({"kind": "cheap", "model": "mine.json", "items": 3}, "cheap:k=3", Path("at/mine.json")),
        ({"kind": "parity", "model": "mine.json", "items": 2}, "parity:k=2", Path("at/mine.json")),
        ({"kind": "concat-parity", "model": "mine.json", "items": 4}, "parity:form=concat,k=4", Path("at/mine.json")),
    ],
)
def test_codes_are_named_as_everywhere_and_as_before(entry: object, text: str, card: Path | None) -> None:
    (code,) = read_config({"codes": [entry]}, Path("at")).codes
    assert (str(code.settings), code.model) == (text, card)


@pytest.mark.parametrize("name", ["max_failures", "most_failures"])  # most_failures is the older name
def test_the_limit_of_failures_has_an_older_name_too(name: str) -> None:
    assert read_config({"health": {name: 3, "probes": 4}}).health == HealthSettings(max_failures=3, probes=4)


def test_nodes_are_counted_or_reached() -> None:
    config = read_config({"replicas": ["tcp://127.0.0.1:7000", "http://127.0.0.1:8001"], "backups": 2})
    assert config.replicas == NodesConfig(0, ("tcp://127.0.0.1:7000",), ("http://127.0.0.1:8001",))
    assert config.backups.count == 2


def test_the_documented_file_holds_every_field_and_the_defaults() -> None:
    text = re.findall(r"```yaml\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)[0]
    raw = yaml.safe_load(text)
    # These fields stand there as examples, since their default is "not given".
    examples = {"delay", "run", "remote_model", "remote_version", "worker_key_file"}
    examples |= {"worker_tls", "remote_tls", "remote_credentials", "tls"}
    read_config({name: raw[name] for name in examples})
    for example in examples:
        assert raw.pop(example)
    assert raw["keys"].pop("file")
    assert raw["policy"].pop("default_label") == 0
    assert raw["policy"].pop("certificate")
    assert set(raw.pop("promises")) == {"default", "misses", "audit", "audit_file"}
    assert raw["tracing"].pop("endpoint")
    assert raw["lossy"].pop("listen")
    assert raw["lossy"].pop("key_file")
    assert {f"{name}_s" if name in ("wait", "deadline") else name for name in raw["lossy"]} == set(
        LossyConfig.__dataclass_fields__
    ) - {"listen", "key_file"}
    config = read_config(raw)
    assert config == ServeConfig(name="cifar10-base")
    fields = set(ServeConfig.__dataclass_fields__) - examples - {"certificate", "promises", "models"}
    assert {name.removesuffix("_bytes").removesuffix("_s") for name in fields} == set(raw)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"prot": 1}, "prot: unknown field; known are"),
        ({"tls": {}}, "tls.certificate: is missing"),
        ({"tls": {"certificate": "a", "clients": "some"}}, "tls.clients: must be required or optional, found 'some'"),
        ({"keys": {"open": ["all"]}}, r"keys.open\[0\]: must be health or watch"),
        ({"worker_tls": {"ca": "a"}}, "worker_tls: needs ca and certificate"),
        ({"remote_credentials": {"headers": {"X": 7}}}, "remote_credentials.headers.X: expected a text$"),
        ({"remote_credentials": {"headers": "X"}}, "remote_credentials.headers: expected names of headers"),
        ({"port": "80"}, "port: expected a whole number from 0 to 65535, found '80'"),
        ({"port": True}, "port: expected a whole number"),
        ({"port": 70000}, "port"),
        ({"replicas": 0}, "replicas: at least one is needed"),
        ({"replicas": ["nonsense"]}, "nonsense"),
        ({"replicas": {"count": -1}}, "replicas.count"),
        ({"replicas": {"urls": ["ftp://x"]}}, r"replicas.urls\[0\]"),
        ({"backups": {"cuont": 1}}, "backups.cuont: unknown field"),
        ({"policy": "colage"}, "unknown policy 'colage'; choose from none"),
        ({"policy": {"fill_after": "p101x"}}, "policy.fill_after: expected auto, a quantile like p95 or a duration"),
        ({"policy": {"fill_after": {"at": "p95", "flor": "1ms"}}}, "policy.fill_after.flor: unknown field"),
        ({"policy": {"deadline": "soon"}}, "policy.deadline"),
        (
            {"policy": {"deadline": "0s"}},
            r"policy\.deadline: expected a number from 0.001 to 86400 \(seconds\), found 0.0$",
        ),
        ({"policy": {"group_wait": "soon"}}, r"policy\.group_wait"),
        ({"policy": {"group_wait": "2min"}}, r"policy\.group_wait: expected a number from 0 to 60 \(seconds\)"),
        ({"health": {"slow_factor": 0.5}}, r"health\.slow_factor: expected a number from 1"),
        ({"health": {"max_slow_share": float("nan")}}, r"health\.max_slow_share: expected a number from 0 to 1"),
        ({"health": {"pause": "2s", "max_pause": "1s"}}, r"health\.max_pause: must be at least health\.pause, 2s"),
        ({"health": {"pause": "1min"}}, r"health\.max_pause: must be at least health\.pause, 60s, found 30s"),
        *(
            ({"replicas": wrong}, "replicas: expected a whole number, a list of addresses, or fields, found")
            for wrong in ("x", True, 1.5, None)
        ),
        (
            {"replicas": ["tcp://:1", "ftp://x"]},
            r"replicas\[1\]: expected unix:/path, tcp://host:port, http\(s\)://h",
        ),
        ({"backups": [1, 2]}, r"backups\[0\]: expected unix:/path, .*, found 1$"),
        ({"replicas": ["tcp://host"]}, r"replicas\[0\]: address 'tcp://host'"),
        ({"replicas": {"addresses": ["fd:3"]}}, r"replicas.addresses\[0\]: expected unix:/path or tcp"),
        ({"name": "a/b"}, "name: .* neither / nor white space, found 'a/b'"),
        ({"name": "a b"}, "name: .* neither / nor white space"),
        ({"policy": {"min_confidence": 2}}, "policy.min_confidence"),
        ({"policy": {"max_extra_load": "much"}}, "policy.max_extra_load: expected a number"),
        ({"policy": 3}, "policy: expected fields, found 3"),
        ({"health": {"window": 0}}, "health.window"),
        ({"model": "no-such"}, "model: expected a model card"),
        ({"codes": "collage"}, "codes: expected a list"),
        ({"codes": [{"kind": "collage"}]}, r"codes\[0\].model: a collage code needs a model card"),
        ({"codes": [{"kind": "replicate", "run": "python:m:make"}]}, r"codes\[0\].run: replaces the file of a card"),
        ({"codes": [{"kind": "magic"}]}, r"codes\[0\].kind: code 'magic' is unknown; allowed are replicate"),
        (
            {"codes": ["berut:k=8"]},
            r"codes\[0\]: expected a code \(replicate, .*\), a model card .*, found 'berut:k=8'",
        ),
        ({"codes": ["cheap:k=3"]}, r"codes\[0\].model: a cheap code needs a model card"),
        ({"codes": ["berrut:k=0"]}, r"codes\[0\].kind: code 'berrut:k=0': k: must be a whole number from 1"),
        ({"codes": [{"kind": "replicate", "spares": 2}]}, r"codes\[0\].spares: replicate has no such setting"),
        ({"codes": [{"kind": "berrut:k=8", "spares": 2}]}, r"codes\[0\].spares: kind has settings; add spares=2 there"),
        ({"codes": [{"kind": "berrut", "model": "a.json"}]}, r"codes\[0\].model: berrut runs the replicas' own model"),
        ({"max_body": "much"}, "max_body: expected a size like 64MiB"),
        ({"decode_processes": 0}, "decode_processes: expected a whole number from 1 to 256"),
        ({"decode_memory": "little"}, "decode_memory: expected a size like 64MiB"),
        ({"delay": "two-mode:scael=1"}, "scael"),
        ([], "configuration: expected fields, found"),
        ("text", "configuration: expected fields"),
    ],
)
def test_a_wrong_field_is_named(raw: object, field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        read_config(raw)


def test_all_wrong_fields_are_named_at_once() -> None:
    raw = {"prot": 1, "port": -1, "replicas": {"count": "x", "cuont": 1}, "policy": {"name": "hedge", "copies": 9}}
    with pytest.raises(ConfigurationError) as refused:
        read_config(raw)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "replicas.count",
        "replicas.cuont",
        "policy.copies",
        "port",
        "prot",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 2001-99-99", "is not YAML"),
        ("a: !!int ''", "is not YAML"),
        ("a: !!bool x", "is not YAML"),
        ("a: !!timestamp x", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=why) as caught:
        load_raw(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["port: 1\nhost: x\n'port': 2\n", "policy:\n  port: 1\n  port: 1\n"])
def test_a_repeated_field_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"c\.yaml: port: is given twice, again in line 3$"):
        load_raw(path)


def test_a_field_merged_from_an_anchor_is_not_a_repeated_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n")
    assert load_raw(path) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


def test_a_wrong_value_is_shown_in_short_however_often_aliases_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    rows = [f"- &a{n} [*a{n - 1}, *a{n - 1}]" if n else "- &a0 x" for n in range(60)]
    path.write_text("host: &all\n" + "\n".join(rows) + "\nport: *a59\nname: *all\n")
    with pytest.raises(ConfigurationError, match="port: expected a whole number") as refused:
        read_config(load_raw(path))
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("field", ["model", "worker_key_file"])
def test_a_zero_in_a_files_name_is_refused(field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field}: expected a text, found 'a.x00.json'"):
        read_config({field: "a\0.json"})


def made_up(chance: random.Random, depth: int = 0) -> object:
    if depth < 3 and chance.random() < 0.25:
        names = [*INNER, *INNER, 1, None, datetime.date(2001, 1, 1)]
        return {chance.choice(names): made_up(chance, depth + 1) for _ in range(chance.randint(0, 4))}
    if depth < 3 and chance.random() < 0.2:
        return [made_up(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    return chance.choice(ODD)


def wrong_fields(raw: dict[str, object]) -> set[str]:
    try:
        read_config(raw, Path("/nowhere"))
    except ProblemsError as error:
        return {str(one.place[0]) for one in error.problems}
    return set()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_fields_hold_is_read_or_refused_by_name(seed: int) -> None:
    chance = random.Random(seed)
    raws = [{chance.choice(TOP): made_up(chance) for _ in range(chance.randint(0, 4))} for _ in range(100)]
    found = [wrong_fields(raw) for raw in raws]
    assert all(wrong <= {*raw, "replicas"} for raw, wrong in zip(raws, found, strict=True))
    assert 20 < sum(map(bool, found)) < 100


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml cannot be read: No such file"):
        load_raw(tmp_path / "none.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigurationError, match="is not YAML"):
        load_raw(path)


def test_how_long_a_group_waits_is_learned_unless_it_is_given():
    assert read_config({}).policy.group_wait_s is None
    assert read_config({"policy": {"group_wait": "auto"}}).policy.group_wait_s is None
    assert read_config({"policy": {"group_wait": "20ms"}}).policy.group_wait_s == 0.02


def test_several_models_have_what_stands_outside_of_the_list_besides_their_own() -> None:
    config = read_config(
        {"port": 9, "replicas": 3, "policy": "none", "models": [{"name": "a"}, {"name": "b", "replicas": 1}]}
    )
    assert [(one.name, one.replicas.count, one.policy.name) for one in config.each] == [
        ("a", 3, "none"),
        ("b", 1, "none"),
    ]
    assert config.port == 9
    alone = read_config({})
    assert alone.each == (alone,)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"models": []}, "models: expected a list of models"),
        ({"models": "a"}, "models: expected a list of models"),
        ({"models": [3]}, r"models\[0\]: expected fields, found 3"),
        ({"models": [{}, {}]}, r"models\[1\].name: 'cifar10-base' is the name of an earlier model, too"),
        ({"models": [{"port": 1}]}, r"models\[0\].port: is of the server, and stands outside of models"),
        ({"models": [{"models": [{}]}]}, r"models\[0\].models: is of the server"),
        ({"models": [{"replicas": 0}]}, r"models\[0\].replicas: at least one is needed"),
        ({"models": [{"fleet": 0}]}, r"models\[0\].fleet: unknown field; known are model"),
        ({"name": "a", "models": [{}]}, "name: is of one model; give it in models"),
        ({"models": [{"lossy": {"listen": "udp://127.0.0.1:9"}}]}, r"lossy.listen: is for a server of one model"),
    ],
)
def test_models_that_do_not_fit_are_named(raw: dict, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        read_config(raw)
