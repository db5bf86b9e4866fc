"""A reader never serves a wrong value: it names and skips damaged files and serves the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ulysses_monitor as um
from ulysses_monitor.bus import Bus
from ulysses_monitor.records import Event, Schema, StepRecord
from ulysses_monitor.store import Location, MetricsReader, RunDirectory, StoreSink, compact

SCHEMA = Schema(tuple(f"a/a/{i}" for i in range(12)))
PART_ROWS = 10


def record(step: int, at: float | None = None) -> StepRecord:
    time = float(step) if at is None else at
    return StepRecord(step, time, SCHEMA, 100.0 * step + np.arange(12.0))


def write(path: Path, steps: range, part_rows: int = PART_ROWS) -> RunDirectory:
    """Writes a run as it looks during a training: sealed parts and a tail."""
    directory = RunDirectory(path, "resume")
    directory.start({})
    sink = StoreSink(directory, part_rows)
    for step in steps:
        sink.write(record(step))
        sink.flush()
    directory.release()
    return directory


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "metrics").iterdir())


def read(run: Path) -> tuple[Any, dict[str, str]]:
    reader = MetricsReader(Location.of(run / "metrics"))
    return reader.read(lambda _: True), dict(reader.damaged)


def assert_nothing_wrong(block: Any) -> None:
    if block.names:
        columns = [int(name.rsplit("/", 1)[1]) for name in block.names]
        truth = 100.0 * block.steps[:, None] + np.array(columns)
        served = np.where(block.present, block.values, truth)
        np.testing.assert_array_equal(served, truth)
    np.testing.assert_array_equal(block.times, block.steps)


def flips(size: int, count: int) -> Iterator[tuple[int, int]]:
    generator = np.random.default_rng(size)
    for _ in range(count):
        yield int(generator.integers(size)), int(generator.integers(8))


@pytest.mark.parametrize("kind", ["part", "tail", "compacted"])
def test_a_flipped_bit_is_never_served(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    write(run, range(1, 26))
    assert [n.split("-")[0] for n in names(run)] == ["_tail", "part", "part"]
    if kind == "compacted":
        compact(run / "metrics")
        write(run, range(26, 31))
    prefix = {"part": "part-00001", "tail": "_tail", "compacted": "metrics.parquet"}[kind]
    path = next(p for p in (run / "metrics").iterdir() if p.name.startswith(prefix))
    whole = path.read_bytes()
    own = {"part": set(range(11, 21)), "tail": set(range(21, 26)), "compacted": set(range(1, 26))}
    every = set(range(1, 31 if kind == "compacted" else 26))
    noticed = 0
    for at, bit in flips(len(whole), 300):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        block, why = read(run)
        assert_nothing_wrong(block)
        assert set(block.steps[block.present.all(axis=1)]) >= every - own[kind]
        assert set(why) <= {path.name}
        missing = every - set(block.steps[block.present.all(axis=1)])
        # Damage at the end of a tail looks like an incomplete write of a killed process.
        if missing and not (kind == "tail" and missing == {25}):
            assert path.name in why
            noticed += 1
    assert noticed > 30
    path.write_bytes(whole)
    block, why = read(run)
    assert (set(block.steps), why) == (every, {})


def test_a_damaged_column_of_a_compacted_run_loses_only_that_column(tmp_path: Path) -> None:
    import pyarrow.parquet

    run = tmp_path / "run"
    write(run, range(1, 26))
    compact(run / "metrics")
    path = run / "metrics/metrics.parquet"
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(2 + 5)
    whole = bytearray(path.read_bytes())
    whole[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path.write_bytes(whole)
    reader = MetricsReader(Location.of(run / "metrics"))
    block = reader.read(lambda _: True)
    assert set(SCHEMA.names) - set(block.names) == {"a/a/5"}
    assert block.steps.tolist() == list(range(1, 26))
    assert_nothing_wrong(block)
    assert reader.damaged == {path.name: "the checksum of a/a/5 does not match"}
    reader.read(lambda name: name == "a/a/1")
    assert reader.damaged  # known damage stays known


@pytest.mark.parametrize("prefix", ["part-00001", "metrics.parquet"])
def test_a_truncated_file_is_named_and_the_rest_served(tmp_path: Path, prefix: str) -> None:
    run = tmp_path / "run"
    write(run, range(1, 26))
    if prefix == "metrics.parquet":
        compact(run / "metrics")
        write(run, range(26, 31))
    path = next(p for p in (run / "metrics").iterdir() if p.name.startswith(prefix))
    whole = path.read_bytes()
    for cut in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        block, why = read(run)
        assert_nothing_wrong(block)
        assert set(why) == {path.name}
        expected = range(26, 31) if prefix == "metrics.parquet" else [*range(1, 11), *range(21, 26)]
        assert block.steps.tolist() == list(expected)


def test_damage_in_the_middle_of_a_tail_loses_only_its_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, range(1, 10))
    path = run / "metrics/_tail-00000.arrows"
    whole = bytearray(path.read_bytes())
    values = np.float32(100.0 * 4 + np.arange(12)).tobytes()  # of step 4
    at = bytes(whole).index(values)
    whole[at] ^= 1
    path.write_bytes(whole)
    block, why = read(run)
    assert block.steps.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert_nothing_wrong(block)
    assert why == {path.name: "some of its steps are damaged"}


def test_compaction_keeps_a_damaged_part_where_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, range(1, 36))
    path = next(p for p in (run / "metrics").iterdir() if p.name.startswith("part-00001"))
    whole = bytearray(path.read_bytes())
    whole[bytes(whole).index(np.float32(100.0 * np.arange(11, 21)).tobytes())] ^= 1
    path.write_bytes(whole)
    assert list(compact(run / "metrics")) == [path.name]
    # The files after it stay too: the compacted file counts as the oldest and must hide nothing.
    left = names(run)
    assert [name.split("-")[0] for name in left] == ["_tail", "metrics.parquet", "part", "part"]
    assert path.name in left
    assert path.read_bytes() == bytes(whole)
    block, why = read(run)
    assert set(why) == {path.name}
    # The intact columns are still served.
    assert block.steps.tolist() == list(range(1, 36))
    lost = block.steps[~block.present[:, block.names.index("a/a/0")]]
    assert lost.tolist() == list(range(11, 21))
    assert block.present.sum() == 35 * 12 - 10
    reader = MetricsReader(Location.of(run / "metrics"))
    assert len(reader.read(lambda name: name == "a/a/5").steps) == 35
    assert reader.damaged == {}


def test_parts_are_opened_by_arrow_and_pandas_and_parquet_by_duckdb(tmp_path: Path) -> None:
    import duckdb
    import pandas as pd
    import pyarrow.dataset

    run = tmp_path / "run"
    write(run, range(1, 21))
    (run / "metrics" / names(run)[0]).unlink()  # the tail of step 11 to 20, sealed at 21
    write(run, range(11, 22))
    parts = sorted(p for p in (run / "metrics").iterdir() if p.name.startswith("part"))
    frame = pd.read_feather(parts[0])
    assert frame["step"].tolist() == list(range(1, 11))
    dataset = pyarrow.dataset.dataset(run / "metrics", format="ipc")
    assert dataset.count_rows() == 20
    found = duckdb.sql('select max("a/a/3") from dataset').fetchall()
    assert found == [(2003.0,)]
    compact(run / "metrics")
    found = duckdb.read_parquet(str(run / "metrics/*.parquet")).filter("step = 7")
    assert found.select('"a/a/3"').fetchall() == [(703.0,)]


def test_a_tail_whose_part_is_compacted_does_not_come_back(tmp_path: Path) -> None:
    """A writer was killed after it sealed the tail and before it removed it."""
    run = tmp_path / "run"
    write(run, range(1, 11))
    tail = (run / "metrics/_tail-00000.arrows").read_bytes()
    write(run, range(1, 1))
    directory = RunDirectory(run, "resume")
    sink = StoreSink(directory, PART_ROWS)
    for step in range(6, 26):  # trained again with other values
        sink.write(StepRecord(step, 1e9, SCHEMA, np.full(12, -float(step))))
    sink.flush()
    directory.release()
    (run / "metrics/_tail-00001.arrows").write_bytes(tail)  # beside part-00001
    assert "part-00001" in "".join(names(run))
    for _ in range(2):
        served = um.open_run(run).metrics("a/a/3")["a/a/3"]
        assert served.loc[1:5].tolist() == [100.0 * s + 3 for s in range(1, 6)]
        assert served.loc[6:].tolist() == [-float(s) for s in range(6, 26)]
        compact(run / "metrics")
    assert names(run) == ["metrics.parquet"]


def test_a_truncated_part_is_served_from_its_tail(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, range(1, 11))
    tail = (run / "metrics/_tail-00000.arrows").read_bytes()
    write(run, range(11, 12))
    compact(run / "metrics")
    shutil.rmtree(run / "metrics")
    write(run, range(1, 12))
    part = next(p for p in (run / "metrics").iterdir() if p.name.startswith("part-00000"))
    part.write_bytes(part.read_bytes()[:100])
    (run / "metrics/_tail-00000.arrows").write_bytes(tail)
    block, why = read(run)
    assert block.steps.tolist() == list(range(1, 12))
    assert set(why) == {part.name}
    assert_nothing_wrong(block)


def test_a_tail_that_begins_with_zeros_is_named_and_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, range(1, 6))
    tail = run / "metrics/_tail-00000.arrows"
    tail.write_bytes(bytes(8) + tail.read_bytes()[8:])
    assert set(read(run)[1]) == {tail.name}
    compact(run / "metrics")
    assert tail.exists()


ODD = [
    StepRecord(3, 0.0, SCHEMA, np.zeros(11)),
    StepRecord(3, 0.0, SCHEMA, np.zeros((12, 1))),
    StepRecord(2**70, 0.0, SCHEMA, np.zeros(12)),
    StepRecord(None, 0.0, SCHEMA, np.zeros(12)),  # type: ignore[arg-type]
    StepRecord(3, 0.0, Schema(()), np.zeros(0)),
    StepRecord(3, 0.0, SCHEMA, np.array(["x"] * 12)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_one_invalid_record_loses_only_itself(tmp_path: Path, odd: StepRecord) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    bus = Bus([StoreSink(directory)])
    for step in range(1, 11):
        bus.publish(record(step))
        if step == 5:
            bus.publish(odd)
    bus.close()
    directory.finish("finished")
    assert bus.dropped() == {"store": 1}
    assert um.open_run(tmp_path / "run").metrics().index.tolist() == list(range(1, 11))


@pytest.mark.parametrize("name", ["a::b", "a b#c?d*[e]", "~x", "memory:x"])
def test_a_run_directory_may_have_any_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / name / "run"
    for first in (1, 4):
        write(run, range(first, first + 3))
    assert um.open_run(run).metrics().index.tolist() == [1, 2, 3, 4, 5, 6]
    monkeypatch.chdir(tmp_path)
    assert len(um.open_run(f"{name}/run").metrics()) == 6


# -- growth -----------------------------------------------------------------------------------


def test_a_schema_may_grow_during_a_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory, part_rows=7)
    for step in range(1, 101):
        schema = Schema(tuple(f"a/a/{i}" for i in range(1 + step // 10)))
        values = np.arange(float(len(schema.names))) + step
        sink.write(StepRecord(step, float(step), schema, values))
    sink.flush()
    for _ in range(2):
        frame = um.open_run(tmp_path / "run").metrics()
        assert frame.shape == (100, 11)
        for i in range(11):
            column = frame[f"a/a/{i}"].dropna()
            assert column.index[0] == max(1, 10 * i)
            np.testing.assert_array_equal(column, column.index + i)
        if not directory._lock.closed:
            sink.close()
            directory.release()


def test_records_with_ever_new_schemas_do_not_exhaust_file_handles(tmp_path: Path) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory)
    for step in range(1, 501):  # as an evaluation would
        sink.write(StepRecord(step, 0.0, Schema(("eval/loss/total",)), np.array([float(step)])))
    assert len(names(tmp_path / "run")) == 1
    for step in range(1, 301):  # new names each time
        sink.write(StepRecord.of(step, 0.0, {f"eval/loss/{step}": float(step)}))
    assert len(list(Path("/proc/self/fd").iterdir())) < open_before + 100
    sink.flush()
    frame = um.open_run(tmp_path / "run").metrics()
    assert frame["eval/loss/total"].tolist() == [float(s) for s in range(1, 501)]
    assert frame["eval/loss/300"].dropna().to_dict() == {300: 300.0}
    directory.release()


def test_a_step_trained_twice_in_one_process_is_served_from_the_later_training(
    tmp_path: Path,
) -> None:
    """After a roll-back, the same schema and file go on."""
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory, part_rows=7)
    for step in [*range(1, 11), *range(6, 16)]:
        again = step in range(6, 11) and directory.path.name == "again"
        sink.write(StepRecord(step, 0.0, SCHEMA, np.full(12, float(step + again))))
        if step == 10:
            directory.path = Path("again")
    directory.path = tmp_path / "run"
    sink.flush()
    frame = um.open_run(tmp_path / "run").metrics("a/a/0")
    assert frame["a/a/0"].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15]
    directory.release()


def test_a_clock_that_jumps_neither_loses_nor_reorders_steps(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.start({})
    sink = StoreSink(directory, part_rows=7)
    times = [1e9, 2e9, 0.0, -5.0, float("nan"), 1e9 + 1]
    for step in range(1, 31):
        sink.write(record(step, times[step % len(times)]))
    sink.flush()
    sink.close()
    directory.release()
    frame = um.open_run(tmp_path / "run").metrics()
    assert frame.index.tolist() == list(range(1, 31))
    np.testing.assert_array_equal(frame["a/a/3"], 100.0 * frame.index + 3)


# -- disks that fail ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)  # noqa: S607


def test_a_disk_that_is_full_for_a_while_loses_nothing(small_disk: Path) -> None:
    filler = small_disk / "filler"
    directory = RunDirectory(small_disk / "run")
    directory.start({})
    sink = StoreSink(directory)
    bus = Bus([sink])
    for step in range(1, 201):
        bus.publish(record(step))
        if step == 100:
            wait_for_steps(small_disk / "run", 100)
            fill(filler)
    assert len(um.open_run(small_disk / "run").metrics()) >= 100  # what was written is served
    block, why = read(small_disk / "run")
    assert_nothing_wrong(block)
    assert why == {}
    filler.unlink()
    bus.publish(Event(kind="stop", step=200, time=0.0))
    bus.close()
    directory.finish("finished")
    run = um.open_run(small_disk / "run")
    assert run.metrics().index.tolist() == list(range(1, 201))
    assert bus.dropped() == {"store": 0}
    assert len(run.events("stop")) == 1


def test_a_disk_that_stays_full_loses_the_rest_and_closing_ends_in_time(small_disk: Path) -> None:
    directory = RunDirectory(small_disk / "run")
    directory.start({})
    bus = Bus([StoreSink(directory)])
    for step in range(1, 101):
        bus.publish(record(step))
    wait_for_steps(small_disk / "run", 100)
    fill(small_disk / "filler")
    for step in range(101, 20_001):
        bus.publish(record(step))
    bus.close(timeout=2.0)
    directory.release()
    block, why = read(small_disk / "run")
    assert_nothing_wrong(block)
    assert why == {}
    assert block.steps.tolist() == list(range(1, len(block.steps) + 1))
    assert len(block.steps) >= 100
    # Items that were only partly written count as lost, and so do events about the store itself.
    assert 20_000 - len(block.steps) <= bus.dropped()["store"] <= 20_000 - 100 + 3


def test_compaction_without_room_changes_nothing(small_disk: Path) -> None:
    run = small_disk / "run"
    write(run, range(1, 40))
    before = names(run)
    fill(small_disk / "filler")
    with pytest.raises(OSError, match="No space"):
        compact(run / "metrics")
    assert names(run) == before
    block, why = read(run)
    assert (len(block.steps), why) == (39, {})


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def wait_for_steps(run: Path, count: int) -> None:
    import time

    deadline = time.monotonic() + 10
    while len(um.open_run(run).metrics()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_directory_that_becomes_read_only_does_not_stop_open_files(tmp_path: Path) -> None:
    """Writes as a user who is not root, because root may write anywhere."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from ulysses_monitor.bus import Bus\n"
        "from ulysses_monitor.records import Schema, StepRecord\n"
        "from ulysses_monitor.store import RunDirectory, StoreSink\n"
        "import ulysses_monitor.store.location\n"
        "path = Path(sys.argv[1])\n"
        "warm = RunDirectory(path.parent / 'warm')\n"  # imports what another user may not read
        "sink = StoreSink(warm, part_rows=1)\n"
        "for step in (1, 2):\n"
        "    sink.write(StepRecord(step, 0.0, Schema(('a/a/0',)), np.zeros(1)))\n"
        "sink.close()\n"
        "if os.getuid() == 0:\n"
        "    os.setgid(65534)\n"
        "    os.setuid(65534)\n"
        "directory = RunDirectory(path)\n"
        "directory.start({})\n"
        "bus = Bus([StoreSink(directory, part_rows=50)])\n"
        "schema = Schema(('a/a/0', 'a/a/1'))\n"
        "for step in range(1, 201):\n"
        "    bus.publish(StepRecord(step, step, schema, 100.0 * step + np.arange(2.0)))\n"
        "    if step == 20:\n"
        "        while not list((path / 'metrics').iterdir()):\n"
        "            time.sleep(0.01)\n"
        "        (path / 'metrics').chmod(0o500)\n"
        "        path.chmod(0o500)\n"
        "bus.close(timeout=2.0)\n"
        "print(bus.dropped()['store'])\n"
    )
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path.cwd(),
    )
    if "Permission denied" in done.stderr and "RunDirectory" in done.stderr:
        pytest.skip("another user may not write here")
    assert done.returncode == 0, done.stderr
    block, why = read(tmp_path / "run")
    assert why == {}
    assert_nothing_wrong(block)
    assert len(block.steps) + int(done.stdout) >= 200
    assert block.steps.tolist() == list(range(1, len(block.steps) + 1))
    assert len(block.steps) >= 50
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_an_unreadable_run_json_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path / "run", range(1, 3))
    (tmp_path / "run/run.json").write_text('{"name": ')
    with pytest.raises(um.InputError, match=r"run\.json"):
        um.open_run(tmp_path / "run").info  # noqa: B018
    with pytest.raises(um.InputError, match=r"run\.json"):
        RunDirectory(tmp_path / "run", "resume")
    assert json.dumps(names(tmp_path / "run"))
