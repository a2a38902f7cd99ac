"""Who may ask the Prefect servers that Treeline starts: only the user, and only by their own names."""

import base64
import http.client
import json
import os
import pwd
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ROOT, Api, Serve, awaited

pytestmark = [pytest.mark.services, pytest.mark.slow]
FOREIGN = "http://evil.example"
RUN = """
from flows import server
import os, sys
server.configure(os.environ)
with server.for_run() as wait:
    wait()
    print(os.environ["PREFECT_API_URL"], flush=True)
    sys.stdin.read()
"""


class Run:
    """The server of a `run` whose work is to wait."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TREELINE_"))}
        self.folder, environment = folder, {**kept, "TREELINE_ARTIFACTS": str(folder)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )
        assert self.process.stdout is not None
        self.api = Api(self.process.stdout.readline().strip(), (folder / ".prefect" / "auth").read_text())

    def end(self) -> None:
        self.process.communicate()


@contextmanager
def running(folder: Path) -> Iterator[Run]:
    run = Run(folder)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


@pytest.fixture(scope="module", params=["serve", "run"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve | Run]:
    folder = tmp_path_factory.mktemp(request.param) / "store"
    with Serve(folder) if request.param == "serve" else running(folder) as started:
        if request.param == "run":  # what there is to attack
            flow = started.api("/flows/", {"name": "treeline"})
            started.api(
                "/deployments/",
                {"name": "quickstart", "flow_id": flow["id"], "entrypoint": "flows/pipeline.py:pipeline"},
            )
        yield started


def ask(api: Api, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str]]:
    """Ask as anybody can, with the headers given and no others."""
    host, port = api.url.removeprefix("http://").removesuffix("/api").split(":")
    line = http.client.HTTPConnection(host, int(port), timeout=60)
    named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    line.request(method, f"/api{path}", None if body is None else json.dumps(body), named)
    answer = line.getresponse()
    answer.read()
    return answer.status, dict(answer.getheaders())


WRONG = "Basic " + base64.b64encode(b"admin:admin").decode()
NAMES = {"Host": "evil.example"}, {"Origin": FOREIGN}, {"Origin": "null"}
STRANGERS = [({}, False, {401, 403}), ({"Authorization": WRONG}, False, {401, 403})]
STRANGERS += [(names, knows, {400} if "Host" in names else {403}) for names in NAMES for knows in (False, True)]


@pytest.mark.parametrize(("headers", "knows", "codes"), STRANGERS, ids=str)
def test_no_stranger_can_read_change_or_run_anything(
    server: Serve | Run, headers: dict[str, str], knows: bool, codes: set[int]
) -> None:
    if knows:  # even with the password and a token, as a browser that is logged in would send them
        server.api("/flows/filter", {})
        headers = {**{name.replace("-", "_"): value for name, value in server.api.headers.items()}, **headers}
    canary = server.folder.parent / "canary"
    before = server.api.deployment()
    runs = len(server.api("/flow_runs/filter", {}))
    step = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {canary}"}}
    upsert = {
        "name": "quickstart",
        "flow_id": before["flow_id"],
        "entrypoint": before["entrypoint"],
        "pull_steps": [step],
    }
    asked = [
        ("GET", "/csrf-token?client=x", None),
        ("GET", f"/deployments/{before['id']}", None),
        ("POST", "/deployments/", upsert),
        ("PATCH", f"/deployments/{before['id']}", {"entrypoint": f"{canary}.py:flow"}),
        ("POST", f"/deployments/{before['id']}/create_flow_run", {}),
        ("POST", "/admin/database/clear", {"confirm": True}),
    ]
    for method, path, body in asked:
        status, _ = ask(server.api, method, path, body, **headers)
        assert status in codes, (method, path)
    clock = dict.fromkeys(("updated", "status", "last_polled"))  # changed by whoever serves it
    assert {**server.api.deployment(), **clock} == {**before, **clock}
    assert len(server.api("/flow_runs/filter", {})) == runs
    assert not canary.exists()


def test_a_browser_is_not_told_that_another_page_may_ask(server: Serve | Run) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    status, headers = ask(server.api, "OPTIONS", "/flows/", Origin=FOREIGN, **asks)
    assert status in {400, 403}
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    own = server.api.url.removesuffix("/api")
    status, headers = ask(server.api, "OPTIONS", "/flows/", Origin=own, **asks)
    assert status == 200
    assert headers["access-control-allow-origin"] == own


def test_even_with_the_password_a_change_needs_a_token(server: Serve | Run) -> None:
    status, _ = ask(server.api, "POST", "/flows/filter", {}, Authorization=server.api.headers["Authorization"])
    assert status == 403


def test_a_web_socket_of_another_page_or_without_the_password_hears_nothing(server: Serve | Run) -> None:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    address = server.api.url.replace("http", "ws", 1) + "/events/out"
    with pytest.raises(WebSocketException), connect(address, origin=FOREIGN, subprotocols=["prefect"], proxy=None):  # type: ignore[arg-type, list-item]
        pass
    with connect(address, subprotocols=["prefect"], proxy=None) as line:  # type: ignore[list-item]
        line.send(json.dumps({"type": "auth", "token": "admin:admin"}))
        with pytest.raises(WebSocketException):
            line.recv(timeout=60)


def test_another_user_of_this_machine_reaches_nothing(server: Serve | Run) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    nobody = pwd.getpwnam("nobody")
    tries = textwrap.dedent(
        """
        import pathlib, sys, urllib.error, urllib.request
        url, *files = sys.argv[1:]
        for file in files:
            try:
                pathlib.Path(file).read_bytes()
                print("read", file)
            except PermissionError:
                pass
        for path, body in (("/flows/filter", b"{}"), ("/csrf-token?client=x", None)):
            try:
                urllib.request.urlopen(urllib.request.Request(url + path, body, {"Content-Type": "application/json"}))
                print("asked", path)
            except urllib.error.HTTPError as error:
                assert error.code in (401, 403), error.code
        print("done")
        """
    )
    secrets = [*server.folder.rglob("auth"), *server.folder.rglob("*.db"), *server.folder.rglob("*.log")]
    asked = ["python3", "-I", "-c", tries, server.api.url, *map(str, secrets)]
    done = subprocess.run(
        asked, cwd="/", user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_the_server_of_a_run_ends_with_it(tmp_path: Path, how: str) -> None:
    with running(tmp_path / "store") as run:
        assert ask(run.api, "GET", "/health")[0] == 200
        run.end() if how == "ended" else run.process.kill()
        awaited(lambda: _refused(run.api))
    assert (tmp_path / "store" / ".prefect" / "run" / "prefect.db").exists()
    assert not (tmp_path / "store" / ".prefect" / "prefect.db").exists()


def _refused(api: Api) -> bool:
    try:
        ask(api, "GET", "/health")
    except OSError:
        return True
    return False


def test_the_page_is_confined_to_its_server(server: Serve | Run) -> None:
    _, headers = ask(server.api, "GET", "/health")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; script-src 'self' 'unsafe-eval'; ")  # graph and forms compile code
    assert "http" not in policy
