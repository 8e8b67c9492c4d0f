"""Downloads: once, whole or not at all; a copy of one's own; what to do without a network."""

import hashlib
import http.server
import threading

import pytest

from mini_impl.download import fetch

CONTENT = b"date,HUFL,OT\n2016-07-01 00:00:00,5.8,30.5\n2016-07-01 01:00:00,5.7,27.8\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty cache folder, and a server of our own: its address, the requests that came, and what it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200 if self.path == "/a.csv" else 404)
            self.send_header("Content-Length", str(len(answer[0]) + answer[1]))
            self.end_headers()
            self.wfile.write(answer[0])

        def log_message(self, *arguments):
            pass

    requests, answer = [], [CONTENT, 0]  # what it sends, and how many bytes more it promises
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MINI_IMPL_DATA", raising=False)
    yield f"http://127.0.0.1:{server.server_port}", requests, answer
    server.shutdown()
    server.server_close()


def test_a_file_is_downloaded_once(server, tmp_path):
    address, requests, _ = server
    path = fetch(f"{address}/a.csv", "folder/a.csv", SHA256)
    assert path == tmp_path / "cache" / "mini_impl" / "folder" / "a.csv" and path.read_bytes() == CONTENT
    assert fetch(f"{address}/a.csv", "folder/a.csv", SHA256) == path and requests == ["/a.csv"]
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_copy_is_fetched_again(server):
    address, requests, _ = server
    path = fetch(f"{address}/a.csv", "a.csv", SHA256)
    path.write_bytes(b"half of")
    assert fetch(f"{address}/a.csv", "a.csv", SHA256) == path and path.read_bytes() == CONTENT and len(requests) == 2


def test_a_wrong_or_cut_answer_leaves_nothing_on_disk(server, tmp_path):
    address, _, answer = server
    answer[:] = [b"something else", 0]
    with pytest.raises(ValueError, match=rf"is not a.csv as published: its sha256 is .*, not {SHA256}"):
        fetch(f"{address}/a.csv", "a.csv", SHA256)
    answer[:] = [CONTENT[:-10], 10]
    with pytest.raises((ConnectionError, ValueError), match=r"could not download|is not a.csv as published"):
        fetch(f"{address}/a.csv", "a.csv", SHA256)
    with pytest.raises(ConnectionError, match="404"):
        fetch(f"{address}/b.csv", "b.csv", SHA256)
    assert not list(tmp_path.rglob("*.csv"))


def test_a_download_has_a_limit_of_size_and_of_time(server, tmp_path, monkeypatch):
    address, *_ = server
    with pytest.raises(ConnectionError, match=r"could not download .*it is larger than 20 bytes"):
        fetch(f"{address}/a.csv", "a.csv", SHA256, limit=20)
    clock = iter(range(0, 10**6, 1000))
    monkeypatch.setattr("mini_impl.download.time.monotonic", lambda: next(clock))
    with pytest.raises(ConnectionError, match=r"could not download .*it is slower than 32768 bytes a second"):
        fetch(f"{address}/a.csv", "a.csv", SHA256)
    assert not list(tmp_path.rglob("*.csv"))


def test_without_a_network_it_says_what_to_do(server):
    wanted = "if you have a.csv, set the environment variable MINI_IMPL_DATA to the folder that holds it"
    with pytest.raises(ConnectionError, match=f"could not download http://127.0.0.1:1/a.csv .*; {wanted}"):
        fetch("http://127.0.0.1:1/a.csv", "a.csv", SHA256)


def test_a_copy_of_ones_own(server, tmp_path, monkeypatch):
    address, requests, _ = server
    path = tmp_path / "a.csv"
    for given in (path, tmp_path):  # the file, or the folder that holds it
        monkeypatch.setenv("MINI_IMPL_DATA", str(given))
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match=rf"MINI_IMPL_DATA is '{given}', but there is no file {path}"):
            fetch(f"{address}/a.csv", "a.csv", SHA256)
        path.write_bytes(CONTENT)
        assert fetch(f"{address}/a.csv", "a.csv", SHA256) == path
        path.write_bytes(CONTENT + b"\n")
        with pytest.raises(ValueError, match=r"is not a.csv as published"):
            fetch(f"{address}/a.csv", "a.csv", SHA256)
    assert not requests
