"""Reading from a real S3-compatible server, found as a user points to one."""

import os
import subprocess
import sys
import time
import zlib

import faulty
import fsspec
import fsspec.config
import pytest

from recipes.errors import UserError
from shards import remote
from shards.cache import CacheConfig, ShardCache
from shards.remote import RemoteConfig

BLOCK = 1 << 16  # bytes
QUICK = RemoteConfig(attempts=3, first_wait_s=0.01, block_mb=BLOCK / 2**20, stall_s=10)
DATA = faulty.noise(0, 5 * BLOCK + 99)
CRC = zlib.crc32(DATA)


@pytest.fixture(scope="module")
def endpoint():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """URL of a bucket with one file."""
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3_ENDPOINT_URL": endpoint})
    system = fsspec.filesystem("s3")
    if not system.exists("crops"):
        system.mkdir("crops")
        system.pipe_file("crops/set/train-000000.tar", DATA)
    return "s3://crops"


@pytest.mark.parametrize("size, crc", [(len(DATA), CRC), (None, None)], ids=["known", "unknown"])
def test_a_shard_is_fetched(bucket, tmp_path, size, crc):
    url = f"{bucket}/set/train-000000.tar"
    assert remote.read_bytes(url, QUICK) == DATA
    remote.fetch(url, tmp_path / "a", size, crc, QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 5 * BLOCK, 6 * BLOCK])
def test_a_shard_of_another_size_is_refused(bucket, tmp_path, size):
    with pytest.raises(UserError, match=r"longer|bytes came where"):
        remote.fetch(f"{bucket}/set/train-000000.tar", tmp_path / "a", size, CRC, QUICK)


def test_a_shard_that_ends_where_a_block_begins_is_refused(bucket, tmp_path):
    fsspec.filesystem("s3").pipe_file("crops/cut.tar", DATA[:BLOCK])
    with pytest.raises(UserError, match=r"^s3://crops/cut\.tar is shorter than expected"):
        remote.fetch(f"{bucket}/cut.tar", tmp_path / "a", len(DATA), CRC, QUICK)


@pytest.mark.parametrize(
    "name, words",
    [("crops/set/train-000001.tar", "does not exist"), ("no-such-bucket/set/a.tar", "does not exist")],
    ids=["key", "bucket"],
)
def test_what_is_not_there_is_told_at_once(bucket, tmp_path, name, words):
    patient = RemoteConfig(attempts=10, first_wait_s=5)
    began = time.monotonic()
    for get in ((name, None, None), (name, 5, 5)):
        with pytest.raises(UserError, match=f"^s3://{name} {words}"):
            remote.fetch(f"s3://{get[0]}", tmp_path / "a", *get[1:], patient)
    with pytest.raises(UserError, match=f"^s3://{name} {words}"):
        remote.read_bytes(f"s3://{name}", patient)
    assert time.monotonic() - began < 5


def test_missing_credentials_are_told_at_once(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3": '{"use_ssl": false}'})  # another instance
    patient = RemoteConfig(attempts=10, first_wait_s=5)
    with pytest.raises(UserError, match=r"cannot be read without credentials .*AWS_ACCESS_KEY_ID") as caught:
        remote.read_bytes(f"{bucket}/set/train-000000.tar", patient)
    assert str(caught.value).startswith(f"{bucket}/set/train-000000.tar ")


def test_the_cache_reads_from_it_in_a_fresh_process(bucket, endpoint, tmp_path):
    """With nothing but the environment that the head of shards/remote.py names."""
    program = (
        "import os, sys\n"
        "from shards.cache import CacheConfig, ShardCache\n"
        "url, folder, size, crc = sys.argv[1:]\n"
        "descriptor = ShardCache(CacheConfig(folder=folder)).open(url, int(size), int(crc))\n"
        "sys.stdout.buffer.write(os.pread(descriptor, int(size), 0))\n"
    )
    url = f"{bucket}/set/train-000000.tar"
    command = [sys.executable, "-c", program, url, str(tmp_path), str(len(DATA)), str(CRC)]
    environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": endpoint}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == DATA
    cache = ShardCache(CacheConfig(folder=tmp_path))
    fsspec.filesystem("s3").rm("crops/set/train-000000.tar")
    try:
        os.close(cache.open(url, len(DATA), CRC))  # it is in the cache
    finally:
        fsspec.filesystem("s3").pipe_file("crops/set/train-000000.tar", DATA)
