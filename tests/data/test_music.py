"""Pieces on the grid, their melodies, their tokens, and the corpus, against music21's own reading of it."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.music import tokens as tokens
from experiments.music.pieces import alike, by_melody, quodlibets, scale, split, without
from experiments.music.tokens import (
    BAR,
    END,
    HOLD,
    PITCH,
    POSITION,
    REST,
    START,
    VOICES,
    Crops,
    Grammar,
    Whole,
)
from jtl.data import DataError
from jtl.data.readers.midi import Piece, on_grid


def piece(*notes, bar=16, upbeat=0, voices=1, title="made up", tune=""):
    rows = np.array(sorted(notes, key=lambda note: (note[1], note[0])), np.int32)
    return Piece(title, bar, upbeat, voices, rows, tune)


def walk(seed, voices=4, notes=40, title="walk"):
    """Voices that walk about, with rests."""
    rng, rows = np.random.default_rng(seed), []
    for voice in range(voices):
        at, pitch = 0, 72 - 7 * voice
        for _ in range(notes):
            length = int(rng.choice([2, 4, 8, 20]))
            pitch += int(rng.integers(-2, 3))
            rows.append((voice, at, length, pitch))
            at += length + (4 if rng.random() < 0.1 else 0)
    return piece(*rows, voices=voices, upbeat=12, title=f"{title} {seed}")


def test_on_grid_joins_ties_cuts_overlaps_and_begins_with_the_first_note():
    quarter, half = Fraction(1), Fraction(2)
    top = [(quarter, quarter, 60, False), (half, quarter, 60, True), (Fraction(3), half, 62, False)]
    low = [(half, Fraction(3), 48, False), (Fraction(4), quarter, 50, False)]
    found = on_grid("two", Fraction(16), Fraction(4), [top, low])
    assert found is not None and (found.bar, found.upbeat, found.voices) == (16, 8, 2)
    assert found.notes.tolist() == [[0, 0, 8, 60], [1, 4, 8, 48], [0, 8, 8, 62], [1, 12, 4, 50]]
    assert found.length == 16 and found.transposed(-2).melody().tolist() == [58, 60]

    third = Fraction(1, 3)
    triplets = [(i * third, third, 60 + i, False) for i in range(30)]
    assert on_grid("off", Fraction(16), Fraction(0), [triplets]) is None
    assert on_grid("empty voice", Fraction(16), Fraction(0), [top, []]) is None
    assert on_grid("long bars", Fraction(64), Fraction(0), [top]) is None


def test_pieces_of_one_melody_stay_in_one_split():
    pieces = [walk(i, title=f"number {i}") for i in range(20)]
    pieces += [one.transposed(3) for one in pieces[:10]] + [pieces[0], piece((0, 0, 4, 60), tune="hymn")]
    pieces += [piece((0, 0, 4, 61), (0, 4, 4, 60), tune="hymn")]
    group = by_melody(pieces)
    assert group[:10].tolist() == group[20:30].tolist() and group[0] == group[30] and group[31] == group[32]
    assert len(set(group.tolist())) == 21
    found = split(pieces)
    assert sum(map(len, found.values())) == len(pieces) and min(map(len, found.values())) >= 2
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not list(alike(found[one], found[other]))
        assert len(without(found[one], found[other])) == len(found[one])
    assert without(pieces[20:30], pieces[:5]) == tuple(pieces[25:30])
    with pytest.raises(DataError, match="2 pieces of 1 melodies: expected at least three"):
        split([pieces[0], pieces[0].transposed(1)])


def test_tunes_sung_at_once():
    low, high = (60, 53, 40), (81, 76, 64)
    major = np.array([0, 2, 4, 5, 7, 9, 11])
    rng, songs = np.random.default_rng(0), []
    for i in range(12):
        lengths = rng.choice([2, 4, 8], 30)
        degrees = (
            np.clip(rng.integers(-1, 2, 30).cumsum(), -4, 4) + 7
        )  # of G major, moved to another key for each
        pitches = (major[degrees % 7] + 12 * (degrees // 7) + 55 + i).tolist()
        at = [0, *np.cumsum(lengths)[:-1].tolist()]
        notes = [(0, *one) for one in zip(at, lengths.tolist(), pitches, strict=True)]
        songs.append(piece(*notes, upbeat=4 * (i % 4), bar=(16, 12)[i % 2], title=str(i)))
    found = quodlibets(songs, low, high, rounds=2, among=1)
    assert len(found) == 8 and len({one.title for one in found}) > 6
    for half in (found[:2] + found[4:6], found[2:4] + found[6:]):  # the rounds; metres come one after another
        assert sorted(name for one in half for name in one.title.split(" with ")) == sorted(
            map(str, range(12))
        )
    for one in found:
        parts = [songs[int(name)] for name in one.title.split(" with ")]
        assert one.voices == 3 and {part.bar for part in parts} == {one.bar} and one.notes[0, 1] == 0
        for voice, part in enumerate(parts):
            own = one.notes[one.notes[:, 0] == voice]
            by = own[0, 3] - part.notes[0, 3]
            assert abs((own[:, 3].min() + own[:, 3].max()) / 2 - (low[voice] + high[voice]) / 2) < 12
            np.testing.assert_array_equal(own[:, 3], part.notes[: len(own), 3] + by)
            np.testing.assert_array_equal(own[:-1, 2], part.notes[: len(own) - 1, 2])
            assert (own[0, 1] + one.upbeat - part.upbeat) % one.bar == 0  # bars stand over bars
        ends = [one.notes[one.notes[:, 0] == voice] for voice in range(3)]
        assert {int(own[-1, 1] + own[-1, 2]) for own in ends} == {one.length}
        scales = {scale(piece(*own.tolist())) for own in ends if len(set((own[:, 3] % 12).tolist())) == 7}
        assert len(scales) <= 1
    c_major = piece(*((0, 4 * i, 4, pitch) for i, pitch in enumerate((60, 62, 64, 65, 67, 69, 71))))
    assert scale(c_major) == 0 and scale(c_major.transposed(-3)) == 9
    assert scale(songs[3].transposed(2)) == (scale(songs[3]) + 2) % 12


def test_who_sings_together_sounds_well_together():
    """Of four tunes on one scale, in C: the first two are a third apart, the others a second above those."""
    line = np.array([60, 62, 64, 65, 67, 65, 64, 62] * 3 + [60, 64, 67, 72])
    third = np.array([64, 65, 67, 69, 71, 69, 67, 65] * 3 + [64, 67, 71, 76])
    tunes = [
        piece(*((0, 4 * i, 4, pitch) for i, pitch in enumerate(own.tolist())), title=name)
        for name, own in {"a": line, "b": np.roll(third, 1), "c": third, "d": np.roll(line, 1)}.items()
    ]
    assert {scale(tune) for tune in tunes} == {0}
    for seed in range(3):
        pairs = {
            frozenset(one.title.split(" with ")) for one in quodlibets(tunes, (60, 40), (81, 64), seed=seed)
        }
        assert pairs == {frozenset("ac"), frozenset("bd")}


def test_tokens_of_a_hand_made_piece():
    # The soprano holds through the bar line; the alto rests for a quarter, and begins in the upbeat.
    made = piece((0, 0, 8, 72), (0, 8, 16, 74), (1, 0, 4, 65), (1, 8, 4, 64), bar=12, upbeat=8, voices=2)
    p = POSITION
    expected = [START, BAR + 11, VOICES + 1]
    expected += [p + 8, PITCH + 72, PITCH + 65, p + 0, HOLD, REST]
    expected += [p + 4, PITCH + 74, PITCH + 64, p + 8, HOLD, REST, p + 8, END]
    assert tokens.encode(made).tolist() == expected  # the last frame is a bar long
    back = tokens.decode(np.array(expected), "back")
    np.testing.assert_array_equal(back.notes, made.notes)
    assert (back.bar, back.upbeat, back.voices, back.length) == (12, 8, 2, 24)

    long = piece((0, 0, 40, 60))  # longer than two bars: three frames
    assert tokens.encode(long).tolist()[3:] == [p, PITCH + 60, p, HOLD, p, HOLD, p + 8, END]
    cut = tokens.decode(tokens.encode(long)[:7])  # as of a sample that was stopped in its second frame
    assert cut.notes.tolist() == [[0, 0, 16, 60]]


def test_every_piece_comes_back():
    for seed in range(5):
        made = walk(seed, voices=1 + seed % 4)
        back = tokens.decode(tokens.encode(made))
        np.testing.assert_array_equal(back.notes, made.notes)
        assert (back.bar, back.upbeat, back.voices) == (made.bar, made.upbeat, made.voices)


def test_refused_tokens():
    with pytest.raises(DataError, match="expected a piece to begin with START"):
        tokens.decode(np.array([END, BAR, VOICES]))
    with pytest.raises(DataError, match="expected frames of a position and 1 pitches"):
        tokens.decode(np.array([START, BAR + 15, VOICES, PITCH, PITCH, POSITION]))
    with pytest.raises(DataError, match="1 to 8 voices, found 16 and 9"):
        tokens.encode(piece((0, 0, 4, 60), voices=9))


def test_a_grammar_lets_only_pieces_be_written():
    rule, rng = Grammar(bar=12, voices=2), np.random.default_rng(0)
    new = np.zeros((1, 60), np.int32)
    for i in range(60):
        logits = jnp.asarray(rng.normal(size=(1, tokens.SIZE)))
        logits = rule(logits.at[0, END].add(-100.0), jnp.asarray(new), jnp.int32(i))
        allowed = np.flatnonzero(np.isfinite(np.asarray(logits)[0]))
        if i % 3 == 0:
            assert allowed.tolist() == list(range(POSITION, POSITION + 12))
        else:
            assert (HOLD in allowed) == (i > 2) and (END in allowed) == (i > 2 and i % 3 == 1)
            assert set(allowed.tolist()) - {HOLD, END} == {REST, *range(PITCH, tokens.SIZE)}
        new[0, i] = int(logits.argmax())
    assert tokens.decode(np.concatenate([[START, BAR + 11, VOICES + 1], new[0]])).bar == 12


def test_each_token_is_measured_once():
    pieces = [walk(seed) for seed in range(3)] + [walk(9, notes=5)]
    whole = Whole(pieces, length=64)
    batch = whole.batch(np.arange(len(whole)), 64)
    assert batch["input_ids"].shape == (len(whole), 64) and len(whole) > 20
    counted = batch["counts"][:, :-1] != 0
    targets = batch["input_ids"][:, 1:][counted]
    np.testing.assert_array_equal(targets, np.concatenate([tokens.encode(one)[3:] for one in pieces]))
    assert counted.sum() == whole.tokens and whole.notes == sum(len(one.notes) for one in pieces)
    context = np.argmax(counted, 1)
    assert (context[batch["input_ids"][:, 0] != START] >= 30).all()  # half a row
    assert not (counted & (batch["attention_mask"][:, 1:] == 0)).any()


def test_crops_are_pieces_in_other_keys():
    pieces = [walk(seed) for seed in range(4)] + [walk(7, notes=3)]
    keys = tokens.keys_between(pieces, low=[0] * 4, high=[127] * 4)
    for one, (down, up) in zip(pieces, keys, strict=True):
        assert down == -one.notes[:, 3].min() or (
            down < 0 and one.transposed(int(down)).notes[:, 3].min() >= 0
        )
        assert up > 0 and one.transposed(int(up)).notes[:, 3].max() <= 127
    crops = Crops(pieces, 64, np.clip(keys, -5, 5))
    draws = np.random.default_rng(0).random((len(crops), 3))
    draws[:, 0] = np.linspace(0, 1, len(crops))
    batch = crops.batch(np.arange(len(crops)), 64, draws)
    steps = [np.diff(one.melody()).tolist() for one in pieces]
    runs = {tuple(own[i : i + n]) for own in steps for n in range(1, 4) for i in range(len(own) - n + 1)}
    seen = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = row[mask != 0]
        own = own if own[0] == START else np.concatenate([[START], own])
        found = tokens.decode(own)
        assert found.voices == 4 and tuple(np.diff(found.melody())[:3].tolist()) in runs
        seen.append(own[-1] == END)
    assert any(seen) and (batch["input_ids"][:, 0] == START).any() and not all(seen)
    np.testing.assert_array_equal(crops.batch(np.arange(3), 64)["counts"].shape, (3, 64))
    assert tokens.keys_between([pieces[0]], [127] * 4, [0] * 4).tolist() == [
        [0, 0]
    ]  # it fits nowhere: as it is


def test_a_chorale_is_what_music21_reads():
    converter = pytest.importorskip("music21").converter
    from jtl._wheels import fetch_wheel
    from jtl.data.sets.chorales import WHEEL, read_musicxml

    file = fetch_wheel(WHEEL) / "music21/corpus/bach/bwv66.6.mxl"
    parts, bars, first = read_musicxml(file)
    assert list(parts) == ["Soprano", "Alto", "Tenor", "Bass"] and bars == {4} and first == 1
    for part in converter.parse(file, forceSource=True, format="musicxml").parts:
        expected = [
            (
                one.offset,
                one.duration.quarterLength,
                one.pitch.midi,
                one.tie is not None and one.tie.type != "start",
            )
            for one in part.flatten().notes
        ]
        assert parts[part.id] == expected


ABC = """X:1
T:Made up
M:6/8
L:1/8
K:D
A|d2f {g}afd|^g3 =g2 f-|f3 [Ad]3|c>d e2 z f|d3 d2:|
"""


def test_a_tune_is_what_music21_plays():
    music21 = pytest.importorskip("music21")
    from jtl.data.sets.chorales import tune

    handler = music21.abcFormat.ABCHandler()
    handler.process(ABC)
    found = tune(music21.abcFormat, "made up", handler.tokens)
    assert found is not None and (found.bar, found.upbeat, found.voices) == (12, 10, 1)
    played = music21.converter.parse(ABC, format="abc").flatten().notes
    expected = [
        (int(4 * one.offset), max(p.midi for p in one.pitches))
        for one in played
        if one.duration.quarterLength and not (one.tie is not None and one.tie.type == "stop")
    ]
    assert [(start, pitch) for _, start, _, pitch in found.notes.tolist()] == expected
    assert found.notes[found.notes[:, 3] == 78][-2].tolist() == [0, 24, 8, 78]  # over the bar line
    assert tune(music21.abcFormat, "no metre", handler.tokens[:2] + handler.tokens[3:]) is None


def test_the_corpus():
    pytest.importorskip("music21")
    from jtl.data.sets.chorales import FIDDLE, chorales, tunes

    found = chorales()
    assert len(found) == 401 and {one.voices for one in found} == {4}
    parts = split(found)
    names = [{one.tune for one in part if one.tune} for part in parts.values()]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    assert min(map(len, parts.values())) > 40
    fiddle = tunes((FIDDLE,))
    assert 950 < len(fiddle) <= 1059 and {one.voices for one in fiddle} == {1}
    assert np.median([one.notes[:, 3].mean() for one in fiddle]) > 67  # of a violin
