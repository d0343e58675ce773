"""Batches: the same for any number of hosts, resumed anywhere, whatever is wrong with records."""

import logging

import jax
import numpy as np
import pytest

from unipic_jax.core import mesh as meshes
from unipic_jax.core.errors import InputError
from unipic_jax.data import buckets, feed, pipeline
from unipic_jax.data.records import BadRecord, Example
from unipic_jax.data.sources import InMemory, Procedural

SIZES = buckets.sizes(48 * 48, 16, ((1, 1), (2, 1), (1, 2)))


def example(i, task="generate", size=(48, 48)):
    picture = np.full((*size[::-1], 3), i % 256, np.uint8)
    return Example(f"{task}-{i}", f"caption {i}", None if task == "describe" else picture,
                   None if task == "generate" else picture,
                   "yes" if task == "describe" else None,
                   {"context": np.zeros(1, np.float16), "target_moments": np.ones(1, np.float16)})


def collate(examples):
    return {"target": np.stack([e.target for e in examples]),
            "source": np.stack([e.target if e.source is None else e.source for e in examples]),
            "text": np.array([e.text for e in examples], "S16"),
            "cached": np.array([len(e.cached) for e in examples])}


def world():
    shapes = [(48, 48), (64, 32), (40, 90), (100, 100)]
    return [(InMemory("pictures", [example(i, size=shapes[i % 4]) for i in range(592)]), 2),
            (InMemory("edits", [example(i, "edit") for i in range(400)]), 1)]


def take(n, sources=None, **options):
    options = {"batch": 8, "sizes": SIZES, "seed": 3} | options
    both = {"generate": collate, "edit": collate}
    stream = pipeline.batches(sources or world(), both, **options)
    try:
        return [next(stream) for _ in range(n)]
    finally:
        stream.close()


def same(a, b):
    assert [task for task, _ in a] == [task for task, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(hosts):
    whole = take(20, caption_dropout=0.3)
    parts = [take(20, caption_dropout=0.3, host=h, hosts=hosts) for h in range(hosts)]
    joined = [(step[0][0], {k: np.concatenate([p[k] for _, p in step]) for k in step[0][1]})
              for step in zip(*parts)]
    assert all(len({task for task, _ in step}) == 1 for step in zip(*parts))
    same(whole, joined)


def test_resumed_run_sees_what_the_unbroken_one_would():
    whole = take(30, caption_dropout=0.3)
    for start in (1, 7, 23):
        same(whole[start:], take(30 - start, start=start, caption_dropout=0.3))


def test_workers_change_nothing():
    same(take(12, caption_dropout=0.3), take(12, caption_dropout=0.3, workers=2))


def test_seed_changes_the_order():
    a, b = take(5), take(5, seed=4)
    assert any(x["text"].tolist() != y["text"].tolist() for (_, x), (_, y) in zip(a, b))


def test_each_epoch_has_every_record_once_and_its_own_order():
    source = [(InMemory("one", [example(i) for i in range(16)]), 1)]
    texts = [t for _, a in take(4, source, batch=8) for t in a["text"].tolist()]
    assert sorted(texts[:16]) == sorted(texts[16:]) == sorted(f"caption {i}".encode()
                                                               for i in range(16))
    assert texts[:16] != texts[16:]


def test_tasks_alternate_by_weight_and_buckets_by_count():
    steps = take(300)
    tasks = [task for task, _ in steps]
    assert tasks.count("edit") == 100
    assert all(tasks[i:i + 3].count("edit") == 1 for i in range(0, 300, 3))
    squares = sum(a["target"].shape == (8, 48, 48, 3) for t, a in steps if t == "generate")
    assert squares == pytest.approx(200 / 2, abs=2)  # half of them are 48x48 or 100x100
    assert {a["target"].shape for _, a in steps} == {(8, h, w, 3) for w, h in SIZES}


def test_captions_are_dropped_for_generation_only():
    steps = take(200, caption_dropout=0.25)
    dropped = {task: np.concatenate([a["text"] == b"" for t, a in steps if t == task])
               for task in ("generate", "edit")}
    assert 0.2 < dropped["generate"].mean() < 0.3
    assert not dropped["edit"].any()


def test_caches_go_with_what_they_were_made_from():
    picture = [(InMemory("one", [example(i, size=(100, 100)) for i in range(8)]), 1)]
    assert take(1, picture)[0][1]["cached"].tolist() == [1] * 8  # cut: the context is left
    assert take(1, world()[1:])[0][1]["cached"].tolist() == [2] * 8
    exact = [(InMemory("one", [example(i) for i in range(8)]), 1)]
    assert take(1, exact, caption_dropout=1.0)[0][1]["cached"].tolist() == [1] * 8


class Faulty(InMemory):
    def __getitem__(self, i):
        if i % 5 == 2:
            raise BadRecord("its target is a poem")
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_and_named_once(caplog, workers):
    source = [(Faulty("faulty", [example(i) for i in range(20)]), 1)]
    with caplog.at_level(logging.INFO):
        steps = take(10, source, workers=workers)
    lines = [r.getMessage() for r in caplog.records if "bad record" in r.getMessage()]
    assert {line.split("replaced: ")[1] for line in lines} == {
        f"faulty, record {i}: its target is a poem" for i in (2, 7, 12, 17)}
    assert len(lines) == 4
    texts = [t for _, a in steps for t in a["text"].tolist()]
    assert len(texts) == 80
    assert texts.count(b"caption 3") == 2 * texts.count(b"caption 4")
    joined = [take(10, source, host=h, hosts=2) for h in range(2)]
    same(steps, [(a[0], {k: np.concatenate([a[1][k], b[1][k]]) for k in a[1]})
                 for a, b in zip(*joined)])


def test_nothing_but_bad_records():
    class Broken(InMemory):
        def __getitem__(self, i):
            raise BadRecord("it is truncated")

    source = [(Broken("broken", [example(i) for i in range(300)]), 1)]
    with pytest.raises(InputError, match=r"100 bad records in a row, the first being broken, reco"):
        take(1, source)


def test_nothing_to_learn_from(caplog):
    with pytest.raises(InputError, match="no records to generate or edit in none"):
        take(1, [(InMemory("none", []), 1)])
    with pytest.raises(InputError, match="weight above 0"):
        take(1, [(InMemory("none", []), 0)])
    with pytest.raises(InputError, match="9 does not divide over 2 hosts"):
        take(1, batch=9, hosts=2)
    with caplog.at_level(logging.INFO):
        mixed = InMemory("mixed", [example(0), example(1, "describe")])
        assert {task for task, _ in take(3, [(mixed, 1)])} == {"generate"}
    assert "mixed: 1 records to describe are left out" in caplog.text
    assert "mixed: no records to generate at 64x32; the bucket is left out" in caplog.text


def test_procedural_examples_are_not_all_made():
    class Endless:
        made = 0

        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            Endless.made += 1
            return example(i)

    take(1, [(Procedural("endless", Endless()), 1)])
    assert Endless.made < 8 * 20


def test_to_device():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    assert feed.share(mesh, 8) == (0, 1)
    with pytest.raises(InputError, match="9 does not divide over 4 devices; use 8"):
        feed.share(mesh, 9)
    assert feed._share([(4, 6), (6, 8)], 16) == (1, 4)
    with pytest.raises(InputError, match="not one even part"):
        feed._share([(0, 2), (4, 6)], 8)
    steps = take(5)
    placed = list(feed.prefetch(mesh, iter([(t, {"target": a["target"]}) for t, a in steps])))
    assert [t for t, _ in placed] == [t for t, _ in steps]
    for (_, a), (_, b) in zip(steps, placed):
        np.testing.assert_array_equal(a["target"], b["target"])
        assert b["target"].sharding == meshes.batch_sharding(mesh, 4)
        assert isinstance(b["target"], jax.Array)
