"""Ten secrets of ten shapes go into a run, and none of them is in anything that the run leaves or prints."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from urllib.parse import quote

import pytest
import yaml

from dtrain.credentials import MASK, masked, redacted_diff
from dtrain.data.shards.manifest import load as load_manifest
from dtrain.tracking.journal import read
from tests.command_line import command
from tests.data.servers import serve
from tests.digits import tiny
from tests.ranks import run_ranks

SECRETS = {
    "a password with a slash": "hunter/2&co",
    "the key of a signed address": "sIgNaTuRe%2Bone",
    "the same renewed": "sIgNaTuRe-two",
    "a login without a password": "l0gin-token",
    "a password beside the host of a database": "xq7z9/base-pass",
    "an option of another program": "c0met-key",
    "the word of a shell command": "sh3ll-word",
    "a token in changed code": "hf_AbCdEfGhIjKlMnOpQrStUvWx1234",
    "a setting in a changed file": "correct horse battery",
    "a private key": "MIIEpAIBAAKCAQEAtr4nsp0rt",
}


@contextmanager
def guarded(folder, login: str, allowed: set[str]):
    """host:port of a server of `folder` that wants any login, and below /train this one and a query of `allowed`."""
    wanted = f"Basic {base64.b64encode(login.encode()).decode()}"

    def may(path: str, query: str, authorization: str) -> bool:
        if path.startswith("/train"):
            return authorization == wanted and query in allowed
        return authorization.startswith("Basic ")

    with serve(folder, may) as (url, _):
        yield url.removeprefix("http://")


def changed_code(folder) -> dict[str, str]:
    """The environment in which git looks at a repository whose uncommitted changes hold three of the secrets."""
    folder.mkdir()
    names = ("train.py", "sweep.yaml", "cert.txt")
    for name in names:
        (folder / name).write_text("\n")
    git = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    key = SECRETS["a private key"]
    (folder / "train.py").write_text(f'login("{SECRETS["a token in changed code"]}")\nlr = 2e-4\n')
    (folder / "sweep.yaml").write_text(f"password: {SECRETS['a setting in a changed file']}\nsteps: 40\n")
    (folder / "cert.txt").write_text(f"-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n")
    return {"GIT_DIR": str(folder / ".git"), "GIT_WORK_TREE": str(folder)}


def test_nothing_that_a_run_leaves_or_prints_holds_any_of_ten_secrets(digits, server, tmp_path):
    server.start()
    own = {"XDG_CACHE_HOME": tmp_path / "run" / "cache", "DTRAIN_CREDENTIALS": "", "NETRC": tmp_path / "none"}
    manifests = {}
    for split in ("train", "holdout"):
        manifests[split] = tmp_path / split / "manifest.json"
        shutil.copytree(digits / split, tmp_path / split, ignore=shutil.ignore_patterns("*.tar", "*.npz", ".*"))
    signed = [f"sig={SECRETS[name]}" for name in ("the key of a signed address", "the same renewed")]
    login = f"me:{SECRETS['a password with a slash']}"
    environment = own | changed_code(tmp_path / "repository")
    with guarded(digits, login, set(signed)) as host:
        shards = [f"http://{login}@{host}/train?{one}" for one in signed]
        held_out = f"http://{SECRETS['a login without a password']}@{host}/holdout"
        config = tmp_path / "tiny.yaml"
        more = [f"data.manifest={manifests['train']}", f"data.holdout={manifests['holdout']}", "train.steps=4"]
        more += ["data.allow_pipe=true", "eval.features=pixels", "eval.metrics=[fd, kid]"]
        given = yaml.safe_load(tiny(digits, tmp_path / "run", *more).dump())
        given["data"] |= {"shards": shards[0], "holdout_shards": held_out}
        pipe = f"pipe:WORD={SECRETS['the word of a shell command']} cat {digits}/train"
        given["data"]["mix"] = [{"name": "more", "shards": pipe, "manifest": str(manifests["train"]), "weight": 1.0}]
        option = {"comet": {"enabled": False, "api_key": SECRETS["an option of another program"]}}
        given["deepspeed"]["extra"] = option
        given["tracking"]["uri"] = (
            f"mysql://u:{SECRETS['a password beside the host of a database']}@away/db?charset=utf8"
        )
        config.write_text(yaml.safe_dump(given))
        run = tmp_path / "run" / "tiny"

        printed = run_ranks(command, 1, "train", config, environment=environment)
        renewed = [f"data.shards={shards[1]}", "train.steps=6", "train.keep_last=2"]
        renewed += ["tracking.enabled=true", f"tracking.uri={server.url}", "tracking.experiment=secrets"]
        printed += run_ranks(command, 1, "train", config, *renewed, environment=environment)
        assert [code for code, _ in printed] == [0, 0], printed

        written = yaml.safe_load((run / "config.yaml").read_text())
        assert written["data"]["shards"] == f"http://{host}/train?•••"
        assert written["deepspeed"]["extra"] == {"comet": {"enabled": False, "api_key": "•••"}}

        # The config is kept without: later commands are told by what stands in the environment.
        without = run_ranks(command, 1, "evaluate", run, environment=own)
        assert [(code, text.count("\n")) for code, text in without] == [(2, 1)]
        assert "HTTP 403" in without[0][1]
        assert "DTRAIN_CREDENTIALS" in without[0][1]
        lent = own | {"DTRAIN_CREDENTIALS": f"{shards[1]} http://{SECRETS['a login without a password']}@{host}/"}
        printed += run_ranks(command, 1, "evaluate", run, environment=lent)
        printed += run_ranks(command, 1, "report", run, environment=own)
        assert [code for code, _ in printed] == [0, 0, 0, 0], printed

        refused = f"data.shards=http://me:{SECRETS['a login without a password']}@{host}/train"
        anew = f"data.cache_dir={tmp_path}/run/another-cache"  # in the first one lies all that was read
        printed += without + run_ranks(command, 1, "train", config, refused, anew, "train.steps=8", environment=own)
        printed += run_ranks(command, 1, "train", config, f"data.shards=[{shards[0]}]", environment=own)
        printed += run_ranks(command, 1, "train", config, shards[0], environment=own)
        assert [code for code, _ in printed[-3:]] == [2, 2, 2], printed

    files = [path for place in (tmp_path / "run", server.folder) for path in place.rglob("*") if path.is_file()]
    kept = {path: path.read_bytes() for path in files} | {"the terminal": "".join(text for _, text in printed).encode()}
    basic = base64.b64encode(login.encode()).decode()
    for secret in (*SECRETS.values(), *(quote(one, safe="") for one in SECRETS.values()), basic):
        for form in {secret, json.dumps(secret)[1:-1], *(part for part in secret.split("/") if len(part) > 4)}:
            assert [str(place) for place, data in kept.items() if form.encode() in data] == [], form

    # What is no secret is there, and a renewed signature changed nothing of what the run is.
    lines = read(run / "journal.jsonl")
    changed = [line["context"]["changed"] for line in lines if line["event"] == "config"]
    keys = {"tracking.enabled", "tracking.uri", "tracking.experiment", "train.steps", "train.keep_last"}
    assert changed[0].keys() == keys
    assert changed[0]["tracking.uri"][0] == "mysql://away/db?charset=utf8"
    (difference,) = {path.read_text() for path in run.glob("attempts/*/uncommitted.diff")}
    assert "+lr = 2e-4\n" in difference
    assert "+steps: 40\n" in difference
    assert (
        sum(b"secrets" in data for data in kept.values()) > 0
    )  # the experiment's name: the search finds what is there
    assert load_manifest(manifests["train"]).samples == 1437


def test_what_an_address_needs_comes_from_the_environment_or_netrc(digits, tmp_path):
    """An index made with a login in the address, and a verification with one in a netrc file."""
    with guarded(digits, "me:pa/ss", {"sig=1"}) as host:
        patterns = f"http://me:pa/ss@{host}/train/train-{{000000..000001}}.tar?sig=1"
        code, text = run_ranks(command, 1, "index", patterns, "--out", tmp_path)[0]
        assert (code, "pa/ss" in text) == (0, False)
        made = load_manifest(tmp_path / "manifest.json")
        assert [shard.name for shard in made.shards] == ["train-000000.tar", "train-000001.tar"]
        (tmp_path / "netrc").write_text(f"machine {host.split(':')[0]} login me password pa/ss\n")
        place = f"http://{host}/holdout"
        arguments = ("verify", digits / "holdout", "--shards", place)
        assert run_ranks(command, 1, *arguments, environment={"NETRC": tmp_path / "none"})[0][0] == 2
        assert run_ranks(command, 1, *arguments, environment={"NETRC": tmp_path / "netrc"})[0][0] == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa/ss@host/x?sig=1 is away", "https://host/x?••• is away"),
        ("postgresql://me:1/2@h:5432/db?user=me&password=p&sslmode=on", "postgresql://h:5432/db?sslmode=on"),
        ("http://a/x,http://me:p@w@b/y", "http://a/x,http://b/y"),
        ("http://127.0.0.1:5000/#/runs/1?workflowType=x", "http://127.0.0.1:5000/#/runs/1?workflowType=x"),
        ("s3://bucket/x-0?.tar, https://host:8080/a@b", "s3://bucket/x-0?.tar, https://host:8080/a@b"),
        ("shards 'pipe:curl -u a:b h' would run; say it", "shards 'pipe:•••' would run; say it"),
        ("`pipe:` commands, a basic training of tokens", "`pipe:` commands, a basic training of tokens"),
        ("PGPASSWORD=x run --token y --name z", "PGPASSWORD=••• run --token ••• --name z"),
        ("Authorization: Bearer abcdefgh", "Authorization: •••"),
        ("https://me:pa ss@host/x and wss://me:a b c@h:1/y", "https://host/x and wss://h:1/y"),
        ("http://host:5000 is away, ask me@x.org", "http://host:5000 is away, ask me@x.org"),
        ("http://host:5000; ask me@x.org, http://h: away me@y", "http://host:5000; ask me@x.org, http://h: away me@y"),
        ("wandb_key=0123456789abcdef0123 hf_key: 'aB3dEfGhIjKlMnOpQrStUv'", "wandb_key=••• hf_key: '•••'"),
        (
            "sort_key=name openaiKey=aB3dEfGhIjKlMnOpQrStUv monkey=0123456789abcdef0123",
            "sort_key=name openaiKey=••• monkey=0123456789abcdef0123",
        ),
        (
            "abfss://train@acc.net/im git+https://t0ken@h/x sftp://me:pw@h/y",
            "abfss://train@acc.net/im git+https://h/x sftp://h/y",
        ),
        ("unknown key `auth` in x: 3, google-auth==2.62", "unknown key `auth` in x: 3, google-auth==2.62"),
    ],
)
def test_an_error_keeps_its_sense_without_its_secrets(text, shown):
    from dtrain.errors import UserError

    assert str(UserError(text)) == shown
    assert str(UserError(shown)) == shown


LONG = {"a=1,": 5, "token=a,": 5, 'k="v",': 1, "b: int=3,": 1, "a:b;": 1, "--a-b=c;": 1, 'api_key:"x",': 1, "x://'a": 1}


@pytest.mark.parametrize(("unit", "size"), LONG.items())
@pytest.mark.parametrize("file", ["min.js", "min.json"])
def test_a_long_line_of_a_difference_takes_time_in_proportion(unit, size, file):
    """A start waits for it. 1 MB takes some 1.5 s of processor time; four times that, for slow and busy machines."""
    line = f"+{unit * (size * 200_000 // len(unit))}"
    began = time.process_time()
    shown = redacted_diff(f"diff --git a/{file} b/{file}\n{line}\n")
    assert time.process_time() - began < 6 * size / 5
    assert len(shown) > 20


def test_what_identifies_a_run_is_no_key_of_a_service():
    found = masked({"run_key": "0123456789abcdef0123456789abcdef", "wandb_key": "0123456789abcdef0123456789abcdef"})
    assert found == {"run_key": "0123456789abcdef0123456789abcdef", "wandb_key": MASK}


def test_the_end_of_a_long_line_is_looked_at_too():
    line = f'+{"a=1," * 50_000}api_key="aB3dEfGhIjKl",b=2,hf_key="aB3dEfGhIjKlMnOpQrStUv",{"c=3," * 10}\n'
    shown = redacted_diff(f"diff --git a/x.js b/x.js\n{line}")
    assert shown == f"diff --git a/x.js b/x.js\n{line}".replace("aB3dEfGhIjKlMnOpQrStUv", "•••").replace(
        "aB3dEfGhIjKl", "•••"
    )
