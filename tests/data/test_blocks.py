"""The blocks world: pictures read back, and texts that say what their examples hold.

Texts are read here by a reader of their own, which knows nothing of how they were made.
"""

import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unipic_jax.core.errors import InputError
from unipic_jax.data import blocks
from unipic_jax.data.blocks import scenes
from unipic_jax.data.blocks.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES

NUMBERS = ("zero", "one", "two", "three", "four")
COLOUR, SHAPE, GROUND = "|".join(COLOURS), "|".join(SHAPES), "|".join(BACKGROUNDS)
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
THING = re.compile(rf"(?:the|a) (?:({COLOUR}) )?({SHAPE}|object)(?: in the ({PLACE}))?")
TASK_KINDS = [(task, kind) for task, kinds in blocks.KINDS.items() for kind in kinds]

detect = jax.jit(blocks.detect)


def inside(scene) -> tuple[str, dict]:
    """A scene in words: its background, and (colour, shape) by cell."""
    names = tuple(COLOURS), tuple(SHAPES)
    return tuple(BACKGROUNDS)[scene.background], {
        c: (names[0][scene.colour[c]], names[1][scene.shape[c]])
        for c in range(9) if scene.shape[c] >= 0}


def fits(thing, colour, shape) -> bool:
    return thing[1] == shape and colour in (None, "", thing[0])


def compare(relation: str, first: int, second: int) -> bool:
    (y, x), (v, u) = divmod(first, 3), divmod(second, 3)
    return {"to the left of": x < u, "to the right of": x > u, "above": y < v,
            "below": y > v}[relation]


def satisfies(scene, text: str) -> bool:
    """Whether a scene is what a caption says, and no more."""
    ground, held = inside(scene)
    if (on := re.search(rf" on a ({GROUND}) background$", text)) and on[1] != ground:
        return False
    if many := re.search(r"(two|three|four) (\w+)", text):
        shape = next(s for s in SHAPES if many[2] in (s + "s", s + "es"))
        return [s for _, s in held.values()] == [shape] * NUMBERS.index(many[1])
    wanted = re.findall(rf"\ba (?:({COLOUR}) )?({SHAPE})\b(?: in the ({PLACE}))?", text)
    if colour := re.search(rf" in ({COLOUR})\b", text):
        wanted = [(colour[1], wanted[0][1], "")]
    relation = re.search("to the left of|to the right of|above|below", text)
    return len(held) == len(wanted) and any(
        all(fits(held[c], *w[:2]) and w[2] in ("", PLACES[c]) for c, w in zip(cells, wanted))
        and (not relation or compare(relation[0], *cells))
        for cells in itertools.permutations(held))


def find(held: dict, colour, shape, place) -> int:
    """The one cell that words mean."""
    found = [c for c, thing in held.items()
             if fits(thing, colour, shape) and place in (None, PLACES[c])]
    assert len(found) == 1, (held, colour, shape, place)
    return found[0]


def follow(ground: str, held: dict, text: str) -> tuple[str, dict]:
    """What an instruction without "and" makes of a scene."""
    held, verb = dict(held), text.split()[0]
    if to := re.search(rf"background(?: to)? ({GROUND})$", text):
        return to[1], held
    things = THING.findall(text)
    if verb in ("add", "put", "draw"):
        (colour, shape, place), = things
        assert PLACES.index(place) not in held
        return ground, held | {PLACES.index(place): (colour, shape)}
    cell = find(held, things[0][0], things[0][1], things[0][2] or None)
    was = held.pop(cell)
    if verb in ("remove", "delete", "erase"):
        return ground, held
    if verb == "move":
        to = PLACES.index(text.rsplit(" to the ", 1)[1])
        assert to not in held
        assert to != cell
        return ground, held | {to: was}
    if len(things) == 2:
        return ground, held | {cell: things[1][:2]}
    return ground, held | {cell: (re.search(rf"({COLOUR})$", text)[1], was[1])}


def answer(scene, text: str) -> str:
    ground, held = inside(scene)
    if text == "Describe the picture.":
        things = [f"a {' '.join(held[c])} in the {PLACES[c]}" for c in sorted(held)]
        return ", ".join([*things, f"on a {ground} background"])
    if "background" in text:
        return ground
    if many := re.match(r"How many (.+) are there", text):
        what = many[1].removesuffix(" objects")
        return NUMBERS[sum(what == "objects" or what == c or what in (s + "s", s + "es")
                           for c, s in held.values())]
    if text.startswith("Is there"):
        (colour, shape, _), = THING.findall(text)
        return "yes" if (colour, shape) in held.values() else "no"
    if at := re.match(rf"What is in the ({PLACE})\?", text):
        return "a " + " ".join(held[PLACES.index(at[1])]) if PLACES.index(at[1]) in held else (
            "nothing")
    (colour, shape, place), = THING.findall(text)
    cell = find(held, colour, shape, place or None)
    if text.startswith("What color"):
        return held[cell][0]
    if text.startswith("Where"):
        return f"in the {PLACES[cell]}"
    relation = re.search("to the left of|to the right of|above|below", text)[0]
    found = [held[c] for c in held if compare(relation, c, cell)]
    assert len(found) < 2
    return "a " + " ".join(found[0]) if found else "nothing"


def random_scenes(n: int, seed: int = 0) -> scenes.Scene:
    rng = np.random.default_rng(seed)
    empty = rng.random((n, 9)) < rng.random((n, 1))
    return scenes.Scene(
        rng.integers(len(BACKGROUNDS), size=n, dtype=np.int32),
        np.where(empty, -1, rng.integers(len(SHAPES), size=(n, 9), dtype=np.int32)),
        np.where(empty, -1, rng.integers(len(COLOURS), size=(n, 9), dtype=np.int32)))


def blurred(pictures: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of [B, h, w, C] with the border repeated."""
    at = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (at / sigma) ** 2) / np.exp(-0.5 * (at / sigma) ** 2).sum()
    for axis in (1, 2):
        width = [(4, 4) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(pictures, width, mode="edge")
        pictures = sum(k * padded.take(np.arange(48) + i, axis) for i, k in enumerate(kernel))
    return pictures


def same(a: scenes.Scene, b: scenes.Scene) -> np.ndarray:
    return ((np.asarray(a.background) == b.background)
            & (np.asarray(a.shape) == b.shape).all(-1) & (np.asarray(a.colour) == b.colour).all(-1))


@pytest.mark.parametrize(("noise", "blur"), [(0, 0), (0.08, 0), (0.16, 0), (0, 0.7), (0.12, 0.7)])
def test_every_scene_is_read_back_exactly(noise, blur):
    drawn = random_scenes(2000)
    pictures = scenes.draw(drawn) / 255
    if blur:
        pictures = blurred(pictures, blur)
    pictures += noise * np.random.default_rng(1).normal(size=pictures.shape)
    read, margin = detect(jnp.asarray(pictures, jnp.float32))
    assert same(read, drawn).all()
    assert np.all(margin > 0.25)
    if not noise and not blur:
        assert np.all(margin > 0.99)


def test_what_is_no_scene_is_not_read_as_one():
    rng = np.random.default_rng(2)
    drawn = scenes.draw(random_scenes(256)) / 255
    messes = {
        "uniform noise": rng.random(drawn.shape),
        "strong noise": 0.5 + 0.5 * rng.normal(size=drawn.shape),
        "not a number": np.full(drawn.shape, np.nan)}
    for name, mess in messes.items():
        read, _ = detect(jnp.asarray(mess, jnp.float32))
        assert np.all(read.shape == -2), name
        assert np.all(read.background == -2), name
    # Half of one object and half of none is neither.
    one, none = (scenes.draw(scenes.scene(0, objects)) / 255 for objects in ({4: (1, 2)}, {}))
    read, _ = detect(jnp.asarray((one + none)[None] / 2, jnp.float32))
    assert read.shape[0, 4] == -2
    assert np.all(np.delete(read.shape[0], 4) == -1)


@pytest.mark.parametrize(("task", "kind"), TASK_KINDS)
def test_pictures_and_texts_of_every_kind(task, kind):
    samples = [blocks.sample(task, 3, i, kind=kind, held_out=bool(i % 2)) for i in range(120)]
    assert {s.kind for s in samples} == {kind}
    for field in ("source", "target"):
        pictures = [getattr(s.example, field) for s in samples]
        if pictures[0] is None:
            continue
        assert pictures[0].dtype == np.uint8
        assert pictures[0].shape == (48, 48, 3)
        read, _ = detect(jnp.asarray(np.stack(pictures) / 255, jnp.float32))
        for i, s in enumerate(samples):
            scene = jax.tree.map(lambda a: np.asarray(a)[i], read)  # noqa: B023
            if task == "edit":
                assert same(scene, getattr(s.goal, field))
            elif task == "generate":
                assert satisfies(scene, s.example.text), s.example.text
            else:
                assert answer(scene, s.example.text) == s.example.answer, s.example.text
            assert s.example.task == task
            assert scenes.is_held_out(scene) == bool(i % 2)
            assert len(s.example.text.split()) <= 22


def test_instructions_lead_to_one_target_in_any_order():
    for kind in blocks.EDIT_KINDS:
        for i in range(300):
            s = blocks.edit(4, i, kind=kind)
            parts = s.example.text.split(" and ")
            assert len(parts) == 1 + (kind == "two_at_once")
            for order in itertools.permutations(parts):
                state = inside(s.goal.source)
                for part in order:
                    state = follow(*state, part)
                assert state == inside(s.goal.target), s.example.text
            assert not same(s.goal.source, s.goal.target)


def test_generation_scores_are_what_the_captions_say():
    e = blocks.evaluation("generate", 40)
    read, _ = detect(jnp.asarray(e.target / 255, jnp.float32))
    score = jax.jit(blocks.generation_score)
    exact, graded = score(read, e.goal)
    assert np.all(exact == 1)
    assert np.all(graded == 1)
    for shift in range(1, 12):  # scenes of other captions, mostly of the same kind
        other = jax.tree.map(lambda a: np.roll(a, shift, 0), read)  # noqa: B023
        exact, graded = score(other, e.goal)
        want = [satisfies(jax.tree.map(lambda a: a[i], other), text)  # noqa: B023
                for i, text in enumerate(e.text)]
        assert np.array_equal(exact, want)
        assert np.array_equal(graded == 1, want)
        assert np.all((graded >= 0) & (graded <= 1))
    # A cell that cannot be read is one object too many.
    cell = (read.shape == -1).argmax(-1)
    spoilt = read._replace(shape=read.shape.at[np.arange(len(cell)), cell].set(-2))
    assert not np.any(score(spoilt, e.goal)[0])


def test_the_graded_score_rises_with_what_is_right():
    goals = (blocks.generation(0, i, kind="colour_to_object").goal for i in range(99))
    goal = next(goal for goal in goals if goal.background >= 0)
    (first, second), (one, two) = goal.shape, goal.colour
    held = [{}, {0: (first, two)}, {0: (first, one)}, {0: (first, one), 8: (second, one)},
            {0: (first, one), 8: (second, two)}]
    batch = [scenes.scene((goal.background + 1) % 4, h) for h in held]
    batch.append(scenes.scene(goal.background, held[-1]))
    batch, goals = (jax.tree.map(lambda *a: jnp.stack(a), *xs)
                    for xs in (batch, [goal] * len(batch)))
    exact, graded = blocks.generation_score(batch, goals)
    assert np.all(np.diff(graded) > 0)
    assert graded[0] == 0
    assert np.array_equal(exact, [0, 0, 0, 0, 0, 1])


def test_edit_scores():
    e = blocks.evaluation("edit", 30)
    source, target = e.goal
    exact, kept = blocks.edit_score(target, target, source)
    assert np.all(exact == 1)
    assert np.all(kept == 1)
    exact, kept = blocks.edit_score(source, target, source)
    assert not exact.any()
    assert np.all(kept == 1)
    # One unchanged cell lost: of 9 others and the background, or of the 8 others of a move.
    i = int(np.flatnonzero(e.kind == blocks.EDIT_KINDS.index("recolour"))[0])
    one_source, one_target = (jax.tree.map(lambda a: a[i:i + 1], s) for s in e.goal)
    lost = int(np.flatnonzero((one_source.shape == one_target.shape)[0]
                              & (one_source.colour == one_target.colour)[0])[0])
    spoilt = one_target._replace(shape=one_target.shape.copy())
    spoilt.shape[0, lost] = -2
    exact, kept = blocks.edit_score(spoilt, one_target, one_source)
    assert exact[0] == 0
    assert np.isclose(kept[0], 8 / 9)
    spoilt = one_target._replace(background=(one_target.background + 1) % 4)
    assert np.isclose(blocks.edit_score(spoilt, one_target, one_source)[1][0], 8 / 9)


def test_answers_are_compared_without_case_space_and_full_stop():
    score = blocks.answer_score(["A red  circle.", " yes\n", "two", "a ring"],
                                ["a red circle", "yes", "Two.", "a cross"])
    assert score.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("task", blocks.KINDS)
def test_examples_are_a_function_of_seed_and_index(task):
    source = blocks.Source(task, 17, 10**9)
    assert len(source) == 10**9
    copy = pickle.loads(pickle.dumps(source))
    for i in (5, 10**9 - 1, 3):
        a, b = source[i], copy[i]
        assert a.name == f"blocks/{task}/17/{i}"
        assert (a.text, a.answer, a.turns) == (b.text, b.answer, b.turns)
        for field in ("source", "target"):
            assert np.array_equal(getattr(a, field), getattr(b, field))
    texts, other = ({(e.text, e.answer) for e in blocks.Source(task, seed, 50)}
                    for seed in (17, 18))
    assert len(texts) > 20
    assert texts != other
    with pytest.raises(IndexError):
        source[10**9]
    with pytest.raises(InputError, match="the task 'draw' of blocks is not known"):
        blocks.Source("draw", 0, 1)


def test_kinds_are_drawn_alike_and_evaluations_are_ordered():
    for task, kinds in blocks.KINDS.items():
        drawn = [s.kind for i in range(900) if (s := blocks.sample(task, 0, i)).kind in kinds]
        least = len(kinds) + 4 * (task == "describe")  # of which some are asked more than once
        assert min(map(drawn.count, kinds)) > 0.6 * len(drawn) / least
        e = blocks.evaluation(task, 2)
        assert e.kind.tolist() == np.repeat(np.arange(len(kinds)), 2).tolist()
        again = blocks.evaluation(task, 2)
        assert e.text == again.text
        assert e.text != blocks.evaluation(task, 2, seed=1).text
        assert (e.answer is None) == (task != "describe")


def changes(before, after) -> set[str]:
    """What an edit does, in words."""
    (ground, held), (other, now) = inside(before), inside(after)
    things = [{c: "a " + " ".join(thing) for c, thing in h.items()} for h in (held, now)]
    was, will = ([t.get(c, "nothing") for c in range(9)] for t in things)
    return {f"{w} in the {p} to {n}" for w, n, p in zip(was, will, PLACES) if w != n} | (
        {f"the background to {other}"} if other != ground else set())


def test_half_of_the_training_questions_are_prompts_with_what_they_ask_for():
    samples = [blocks.question(7, i) for i in range(600)]
    asked = [s for s in samples if s.example.target is not None]
    assert 0.43 < len(asked) / len(samples) < 0.57
    edits = [s for s in asked if s.example.source is not None]
    assert 0.57 < len(edits) / len(asked) < 0.77
    target, source = (detect(jnp.asarray(np.stack(pictures) / 255, jnp.float32))[0]
                      for pictures in ([s.example.target for s in asked],
                                       [s.example.source for s in edits]))
    for i, s in enumerate(asked):
        scene = jax.tree.map(lambda a: np.asarray(a)[i], target)  # noqa: B023
        assert not scenes.is_held_out(scene)
        assert s.example.task == "describe"
        if s.example.source is not None:
            assert s.kind in blocks.EDIT_KINDS
            row = next(j for j, e in enumerate(edits) if e is s)
            before = jax.tree.map(lambda a: np.asarray(a)[row], source)  # noqa: B023
            assert set(s.example.answer.split(", ")) == changes(before, scene)
            continue
        assert s.kind in blocks.KINDS["generate"]
        assert satisfies(scene, s.example.text)
        # What the caption leaves open, the description does too.
        words = set(re.findall(r"\w+", s.example.text))
        for word in (*COLOURS, *BACKGROUNDS):
            assert word in words or word not in s.example.answer.split()
        left = [w for w in (*COLOURS, *BACKGROUNDS) if w not in words]
        whole = re.sub(rf"(, on a| a) ({'|'.join(left)})( background)?\b", lambda m: (
            "" if m[3] else " a"), f" {answer(scene, 'Describe the picture.')}").strip()
        assert s.example.answer == whole


def test_training_goes_on_to_ask_about_a_picture():
    examples = list(blocks.Source("describe", 5, 100))
    shown = [e for e in examples if e.source is not None]
    read, _ = detect(jnp.asarray(np.stack([e.source for e in shown]) / 255, jnp.float32))
    for i, e in enumerate(shown):
        assert 2 <= len(e.turns) <= 6
        scene = jax.tree.map(lambda a: np.asarray(a)[i], read)  # noqa: B023
        for question, its in e.turns:
            assert answer(scene, question) == its, question
    assert all(e.turns == () for e in examples if e.source is None)
    assert all(s.example.turns == () for s in (
        blocks.question(5, i, kind="place", held_out=True) for i in range(3)))


def test_several_objects_of_one_sort_share_their_colour():
    samples = [blocks.generation(3, i, kind="counting") for i in range(60)]
    read, _ = detect(jnp.asarray(np.stack([s.example.target for s in samples]) / 255, jnp.float32))
    same = [len(set(row[row >= 0])) == 1 for row in np.asarray(read.colour)]
    assert np.mean(same) == 1


def test_the_vocabulary_is_small():
    text = " ".join(f"{e.text} {e.answer or ''}" for task in blocks.KINDS
                    for e in blocks.Source(task, 1, 500))
    assert len(set(re.findall(r"\w+", text.lower()))) <= 90


def test_pairs_of_coloured_shapes_are_held_out():
    def pairs(**options):
        found = [blocks.generation(5, i, kind="colour_to_object", **options) for i in range(400)]
        return {(*s.goal.shape.tolist(), *s.goal.colour.tolist()) for s in found}

    trained, tested = pairs(), pairs(held_out=True)
    assert not trained & tested
    assert 20 < len(tested) < 60  # of 600
    assert len(trained) > 200


def test_one_in_two_training_captions_says_all():
    samples = [blocks.generation(6, i) for i in range(1200)]
    few = [s for s in samples if s.kind != "counting"]
    full = [s for s in few if re.search(f" in the ({PLACE})", s.example.text)]
    assert 0.43 * len(few) < len(full) < 0.57 * len(few)
    assert 0.7 < np.mean([s.goal.count.sum() == 2 for s in full]) < 0.85
    read, _ = detect(jnp.asarray(np.stack([s.example.target for s in full]) / 255, jnp.float32))
    for i, s in enumerate(full):
        ground, held = inside(jax.tree.map(lambda a: np.asarray(a)[i], read))  # noqa: B023
        said = THING.findall(s.example.text)
        assert s.example.text.endswith(f" on a {ground} background")
        assert {PLACES.index(p): (c, shape) for c, shape, p in said} == held
        if len(said) == 2:  # pairs that are held out are so in these captions too
            assert not scenes.is_held_out_pair(
                [(tuple(SHAPES).index(shape), tuple(COLOURS).index(c)) for c, shape, _ in said])
    assert not any(re.search(f" in the ({PLACE})", text)
                   for text in blocks.evaluation("generate", 40).text)
