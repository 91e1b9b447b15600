"""Tasks: their data and rewards against what they state, held-out parts, the user's files, and rewards that misbehave."""
import gzip
import itertools
import math

import pytest
import torch

import rewards
from rewards import TASKS, TOY_STEP, BadInput, Task, activity, ask, open_task

toy = TASKS["toy"]


def test_toy_is_small_enough_to_enumerate():
    assert toy.enumerable and (toy.vocab_size + 1) ** toy.length <= 100_000


@pytest.mark.parametrize("text, reward", [
    ("TCTCTC", 12), ("TCTCAA", 10), ("TCAAAA", 8), ("AAAAAA", 6), ("GGGGGG", 0), ("CTCTCT", 8), ("ATCGGA", 6)])
def test_toy_reward_by_hand(text, reward):
    assert toy.reward(toy.encode([text])).item() == pytest.approx(reward / 16)


def test_toy_has_many_separate_peaks():
    """No change of one letter improves them, so a greedy climber that starts near a lower one never sees the highest."""
    x = torch.tensor(list(itertools.product(range(4), repeat=6)))
    best = toy.reward(x)
    for i, v in itertools.product(range(6), range(4)):
        y = x.clone()
        y[:, i] = v
        best = torch.where((y != x).any(1) & (toy.reward(y) >= toy.reward(x) - 1e-6), torch.inf, best)
    peaks = toy.decode(x[best.isfinite()])
    assert len(peaks) == 13 and {"TCTCTC", "TCTCAA", "TCAAAA", "AAAAAA"} < set(peaks)


def test_toy_data_follows_its_chain():
    n = 20_000
    x = toy.data(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, 6) and (x == toy.data(n, torch.Generator().manual_seed(0))).all()
    for a, b in itertools.product(range(4), repeat=2):
        before = x[:, :-1] == a
        share = ((x[:, 1:] == b) & before).sum() / before.sum()
        p = TOY_STEP[a, b]
        assert abs(share - p) < 4.5 * (p * (1 - p) / before.sum()).sqrt()            # 16 cells, 4.5 standard errors


def test_encode_and_decode_are_inverse_and_a_foreign_letter_is_named():
    assert toy.decode(toy.encode(["ACG_TA"])) == ["ACG_TA"]
    with pytest.raises(BadInput, match="'X' at position 3 of 'ACXGTA'"):
        toy.encode(["ACXGTA"])


def fails(tokens):
    raise RuntimeError("no oracle today")


@pytest.mark.parametrize("reward, message", [
    (fails, "raised RuntimeError: no oracle today .on 'AC'"),
    (lambda x: torch.zeros(len(x), 2), r"returned shape \[3, 2\] for 3 samples: it must be \[3\]"),
    (lambda x: torch.tensor([0, float("nan"), 0]), "sample 1, 'GT', is nan"),
    (lambda x: torch.tensor([0, 0, float("inf")]), "sample 2, 'AA', is inf"),
    (lambda x: "high", "raised")])
def test_a_reward_that_misbehaves_is_named(reward, message):
    task = Task("t", "ACGT", 2, None, reward)
    with pytest.raises(BadInput, match=message):
        ask(task, task.encode(["AC", "GT", "AA"]))


def test_a_reward_may_return_a_list():
    task = Task("t", "AC", 1, None, lambda x: [float(v) for v in x[:, 0]])
    assert ask(task, torch.tensor([[0], [1]])).tolist() == [0, 1]


def test_the_sample_on_which_a_reward_raises_is_found():
    def reward(tokens):
        assert not (tokens == 2).any(), "no G, please"
        return tokens[:, 0]
    task = Task("t", "ACGT", 3, None, reward)
    strings = ["ACC"] * 7 + ["CGA"] + ["TTT"] * 5
    with pytest.raises(BadInput, match="raised AssertionError: no G, please .*on 'CGA'"):
        ask(task, task.encode(strings))


def test_a_reward_that_raises_once_blames_no_single_sample():
    calls = []

    def reward(tokens):
        calls.append(1)
        if len(calls) == 1:
            raise TimeoutError("busy")
        return tokens[:, 0]
    task = Task("t", "ACGT", 1, None, reward)
    with pytest.raises(BadInput, match="TimeoutError: busy .on a batch that starts with 'A'"):
        ask(task, torch.tensor([[0], [1], [2]]))


def within(count, n, p, sigmas=4.5):
    """A count of n trials at chance p is no surprise."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p)) + 1e-9


# ---- held-out parts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["dna", "arithmetic"])
def test_train_and_held_out_are_disjoint(name):
    """Of what decides: the whole sequence, or the prompt where there is one."""
    task = TASKS[name]
    train, held = task.data(20_000, torch.Generator().manual_seed(0)), task.held(2000, torch.Generator().manual_seed(1))
    assert train.shape == (20_000, task.length) and held.shape == (2000, task.length)
    train, held = (set(task.decode(task.prompts(x) if task.given else x)) for x in (train, held))
    assert not train & held
    if task.given:
        assert 7500 > len(train) > 6500 and 350 < len(held) < 500                    # of 8,100 prompts, a twentieth held out


def test_held_out_windows_of_a_text_share_no_letter_with_the_others():
    data, held = rewards.windows([torch.arange(1000), torch.arange(2000, 2020), torch.arange(5000, 9000)], 20)
    train, test = data(50_000, torch.Generator().manual_seed(0)), held(5000, torch.Generator().manual_seed(0))
    for x in (train, test):
        assert (x.diff(dim=1) == 1).all()                                            # no window runs over two texts
    assert not set(train.flatten().tolist()) & set(test.flatten().tolist())
    assert len(train.unique()) == 950 + 20 + 3800 and len(test.unique()) == 50 + 200


def test_text_holds_out_the_end_of_its_corpus():
    task, whole = TASKS["text"], rewards.corpus()
    cut = len(whole) - len(whole) // 20
    for x, part in ((task.data(300), whole[:cut]), (task.held(300), whole[cut:])):
        assert all(string in part for string in task.decode(x))


# ---- dna ------------------------------------------------------------------------------------------------------------------

dna = TASKS["dna"]
OTHER = str.maketrans("ACGT", "TGCA")


def test_the_background_has_the_genomes_triplets():
    n = 3000
    x = rewards.background(n, 60, torch.Generator().manual_seed(0))
    counts = {a + b + c: 0.0 for a, b, c in itertools.product("ACGT", repeat=3)}
    for a, (i, left) in zip("ACGT", enumerate(rewards.TRIPLETS.tolist())):
        for b, row in zip("CT", left):
            for c, millions in zip("ACGT", row):
                counts[a + b + c] = counts[(a + b + c)[::-1].translate(OTHER)] = millions
    total, shares = sum(counts.values()), rewards.triplets_of(x)
    for share, triplet in zip(shares.tolist(), counts):                            # neighbours depend on each other: 8 sigmas
        assert within(share * n * 58, n * 58, counts[triplet] / total, sigmas=8), triplet
    assert shares[number_of("CCG")] < 0.4 * shares[number_of("CCA")]         # CpG is rare


def number_of(triplet):
    return int(sum(4 ** (2 - i) * "ACGT".index(c) for i, c in enumerate(triplet)))


def test_planted_sites_are_there_at_the_stated_rates():
    n, L = 20_000, 60
    x = rewards.background(n, L, torch.Generator().manual_seed(0))
    before = x.clone()
    factor, start, flip = rewards.plant(x, torch.Generator().manual_seed(1))
    sizes = [len(letters) for letters, _ in rewards.FACTORS.values()]
    fits = start + max(sizes) <= L                     # here no site would have overhung the end
    assert within((factor[fits] >= 0).sum(), fits.sum(), rewards.SITE_RATE)
    assert within(flip[factor >= 0].sum(), (factor >= 0).sum(), 0.5)
    untouched = torch.ones_like(x, dtype=torch.bool)
    for k, (letters, _) in enumerate(rewards.FACTORS.values()):
        b, j = (factor == k).nonzero(as_tuple=True)
        assert within((fits & (factor == k)).sum(), fits.sum(), rewards.SITE_RATE / len(sizes))
        places = start[b, j, None] + torch.arange(sizes[k])
        untouched[b[:, None], places] = False
        site = x[b[:, None], places]
        site = torch.where(flip[b, j, None], 3 - site.flip(1), site)
        for i, letter in enumerate(letters):
            allowed = rewards.IUPAC[letter]
            right = torch.isin(site[:, i], torch.tensor(["ACGT".index(c) for c in allowed])).sum()
            assert within(right, len(site), 1 - rewards.MUTATION * (4 - len(allowed)) / 3)
    assert torch.equal(x[untouched], before[untouched])
    assert set(start.diff(dim=1).flatten().tolist()) == {10, 21, 32}                 # turns of the helix


def spell(**sites):
    """A sequence of 60 T... with the sites given as start=letters (s10="TGACTCA")."""
    letters = list("C" * 60)
    for start, site in sites.items():
        letters[int(start[1:]):int(start[1:]) + len(site)] = site
    return "".join(letters)


@pytest.mark.parametrize("sequence, value", [
    (spell(), 0),
    (spell(s10="TGACTCA"), 0.5), (spell(s10="TGACTGA"), 0),                          # AP-1, and a letter off
    (spell(s10="TGACTCA", s30="TGAGTCA"), 0.75), (spell(s5="TGACTCA", s20="TGACTCA", s40="TGACTCA"), 0.875),
    (spell(s53="TGACTCA"), 0.5), (spell(s54="TGACTC"), 0),                           # at the very end, and over it
    (spell(s3="CAAAGTCCA"), 0.5), (spell(s3="TGGACTTTG"), 0.5),                      # HNF4A on either strand
    (spell(s3="GTTAATAATTAAC"), 0.6), (spell(s3="GTTAATCATTAAC"), 0.6),              # HNF1A, any letter in the middle
    (spell(s3="CAAAGTCCA", s20="GTTAATAATTAAC"), 2.1),                               # ... and both: 1 for the pair
    (spell(s3="GTTAATAATTAAC", s31="TGGACTTTG"), 2.1), (spell(s3="GTTAATAATTAAC", s32="TGGACTTTG"), 1.1),    # 15, 16 between
    (spell(s3="GTTAATAATTAAC", s51="TGGACTTTG"), 1.1), (spell(s0="TGGACTTTG", s9="GTTAATAATTAAC"), 2.1),
    (spell(s10="TGACTCA", s30="AGATAA"), 0.25), (spell(s10="TGACTCA", s30="AGATAA", s45="TTATCT"), 0.125),   # GATA1 represses
    (spell(s10="ATTGCGCAAT"), 0.5), (spell(s10="ATTGCGCAAT", s25="TGTTTAC"), 1.9),   # CEBPA; with FOXA
])
def test_true_activity_by_hand(sequence, value):
    assert activity(dna.encode([sequence])).item() == pytest.approx(value)


def test_both_strands_have_the_same_activity():
    x = dna.data(2000, torch.Generator().manual_seed(0))
    assert torch.allclose(activity(x), activity(3 - x.flip(1))) and activity(x).max() > 1


def test_sites_are_found_as_regular_expressions_find_them():
    import re
    x = dna.data(300, torch.Generator().manual_seed(0))
    hit = rewards.sites_in(x)
    for k, (letters, _) in enumerate(rewards.FACTORS.values()):
        pattern = "".join(f"[{rewards.IUPAC[c]}]" for c in letters)
        other = "".join(f"[{rewards.IUPAC[c].translate(OTHER)}]" for c in reversed(letters))
        for b, s in enumerate(dna.decode(x)):
            starts = {m.start() for p in (pattern, other) for m in re.finditer(f"(?={p})", s)}
            assert set(hit[b, k].nonzero().flatten().tolist()) == starts


def test_the_oracle_learns_from_noise_what_is_true_and_learns_the_same_again():
    task = rewards.dna()
    x, new = task.data(8000, torch.Generator().manual_seed(0)), task.held(1000, torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    task.oracle.fit(x)
    assert torch.equal(before, torch.get_rng_state())
    first, truth = ask(task, new), activity(new)
    assert torch.corrcoef(torch.stack((first, truth)))[0, 1] > 0.7
    task.oracle.fit(x)
    assert torch.equal(first, ask(task, new)) and torch.equal(first[:3], ask(task, new[:3]))        # no batch effects


def test_measures_of_dna():
    x = dna.data(5000, torch.Generator().manual_seed(0))
    measure, truth = dna.measure(x), activity(x)
    top = x[truth.topk(50).indices]
    seen = measure(top, activity(top))
    assert seen["3-mer corr."] == pytest.approx(1, abs=1e-5) and seen["over data's 99%"] > 0.3
    assert seen["true activity (median)"] == pytest.approx(activity(top).median().item())
    assert measure(x, truth)["over data's 99%"] <= 0.01


# ---- arithmetic -----------------------------------------------------------------------------------------------------------

def test_half_of_the_answers_are_wrong_in_one_digit():
    task, n = TASKS["arithmetic"], 20_000
    x = task.data(n, torch.Generator().manual_seed(0))
    right = 0
    for s in task.decode(x):
        a, b, c = s[:2], s[3:5], s[6:]
        assert s[2] == "+" and s[5] == "=" and 10 <= int(a) <= 99 and 10 <= int(b) <= 99
        right += int(a) + int(b) == int(c)
        assert sum(u != v for u, v in zip(f"{int(a) + int(b):03}", c)) <= 1
    assert within(right, n, 0.5) and ask(task, x).sum() == right


def test_the_prompt_is_the_sum_and_the_reward_is_for_the_truth_alone():
    task = TASKS["arithmetic"]
    x = task.encode(["12+34=046", "12+34=047", "99+99=198", "99+99=199", "12=34+046"])
    assert task.decode(task.prompts(x[:1])) == ["12+34=___"]
    assert ask(task, x).tolist() == [1, 0, 1, 0, 0]


# ---- text -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("string, share", [
    ("the cat sat", 1), ("The cat sat", 1), ("the cat xqz", 6 / 9), ("zzz", 0), ("", 0), ("   ", 0),
    ("cat cat cat", (3 - 6) / 9), ("the  cat", 1), ("the   cat", 6 / 7), ("cat" + " " * 9, 3 / 11),
    ("a cat", 1), ("t cat", 3 / 4), ("the,cat.", 1), ("the, cat.", 6 / 7), ("thecat", 0)])
def test_text_reward_by_hand(string, share):
    task = rewards.text(len(string), "the cat sat on a mat, The. xqzt")
    assert ask(task, task.encode([string])).item() == pytest.approx(share)


def test_one_word_over_and_over_earns_less_than_english():
    task = TASKS["text"]
    words = ["the", "statement", "of", "a"]
    hacks = [" ".join([word] * 40)[:task.length] for word in words] + [word.ljust(task.length) for word in words]
    assert ask(task, task.encode(hacks)).max() < 0.35 < 0.7 < ask(task, task.held(500)).mean()


def test_the_corpus_is_prose():
    text = rewards.corpus()
    assert len(text) > 100_000 and set(text) <= set("abcdefghijklmnopqrstuvwxyz.,' ") and "  " not in text


# ---- the user's own data ------------------------------------------------------------------------------------------------

def write(folder, content, name="data.txt"):
    file = folder / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(content.encode()))
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def rows(task, n=1000):
    train, held = task.decode(task.data(n)), task.decode(task.held(n)) if task.held else []
    assert not set(train) & set(held)
    return train, held


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_a_sequence_a_line(tmp_path, name):
    sequences = ["".join(s) for s in itertools.product("ACGT", repeat=4)]
    task = open_task("dna", 4, write(tmp_path, "\r\n".join(sequences).lower() + "\n\n", name))
    train, held = rows(task)
    assert sorted(train + held) == sequences and 3 < len(held) < 30


def test_fasta_with_lines_that_go_on(tmp_path):
    task = open_task("dna", 6, write(tmp_path, ">one of two\nACG\nTTT\n>two\nGGGccc\n", "x.fa.gz"))
    assert rows(task) == (["ACGTTT", "GGGCCC"], [])
    assert rows(open_task("dna", 6, write(tmp_path, b"\xef\xbb\xbf>marked\nACGTTT\n", "x.fa"))) == (["ACGTTT"], [])


def test_padding_adds_a_letter_and_the_reward_does_not_see_it(tmp_path):
    (tmp_path / "own.py").write_text("def score(samples):\n    return [len(s) for s in samples]\n")
    task = open_task("dna", 5, write(tmp_path, "ACGTA\nAC\n"), "-", reward=f"{tmp_path / 'own.py'}:score")
    assert task.alphabet == "ACGT-" and rows(task)[0] == ["ACGTA", "AC---"]
    assert ask(task, task.data(2)).tolist() == [5, 2]


def test_dna_itself_can_be_padded(tmp_path):
    task = open_task("dna", 20, write(tmp_path, "TGACTCA\n" + "C" * 20), "-")
    assert activity(task.data(2)).tolist() == [0.5, 0] and ask(task, task.data(2)).isfinite().all()
    assert dna.measure(task.data(2))(task.data(2), torch.zeros(2))["true activity (median)"] in (0, 0.5)


def test_cropping_takes_windows(tmp_path):
    long = "".join("ACGT"[v] for v in torch.randint(4, (400,), generator=torch.Generator().manual_seed(0)))
    task = open_task("dna", 10, write(tmp_path, f"{long}\nACGTACGTAC\n"), crop=True)
    train, held = rows(task, 5000)
    assert all(s in long[:380] or s == "ACGTACGTAC" for s in train) and all(s in long[380:] for s in held)


def test_cropping_holds_out_whole_sequences_where_none_is_long(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lines = ["".join("ACGT"[v] for v in torch.randint(4, (30 + i % 7,), generator=generator)) for i in range(100)]
    task = open_task("dna", 12, write(tmp_path, "\n".join(lines).lower()), crop=True)
    train, held = rows(task, 5000)
    origin = [{i for i, line in enumerate(lines) for s in part if s in line} for part in (set(train), set(held))]
    assert origin[1] == {19, 39, 59, 79, 99} and origin[0] == set(range(100)) - origin[1]


def test_a_file_of_sums_is_held_out_by_prompt_and_may_be_padded(tmp_path):
    lines = [f"{a}+{b}={c:03}" for a in range(10, 40) for b in (11, 57) for c in (a + b, a + b + 1)]
    task = open_task("arithmetic", 0, write(tmp_path, "\n".join(lines)), "-")
    train, held = (task.decode(task.prompts(x)) for x in (task.data(1000), task.held(1000)))
    assert held and not set(train) & set(held) and len(train) + len(held) == 120
    assert all(s.endswith("=___") for s in train) and task.vocab_size == 13


def test_a_text_brings_its_own_alphabet_and_words(tmp_path):
    task = open_task("text", 12, write(tmp_path, "Zwölf_Boxkämpfer jagen\nViktor quer über den Sylter Deich. " * 10))
    assert set(task.alphabet) == set("Zwölf_Boxkämpfer jagen Viktor quer über den Sylter Deich.") and task.blank == "?"
    assert ask(task, task.encode(["jagen Viktor"])).item() == 1 and ask(task, task.encode(["jagen abcdef".replace("c", "k").
                                                                                         replace("b", "p")])).item() < 1
    assert all(len(s) == 12 for s in task.decode(task.data(100)) + task.decode(task.held(5)))


def test_text_with_a_pad_is_a_sequence_a_line(tmp_path):
    task = open_task("text", 6, write(tmp_path, "MKV\nMKVLAA\n"), "-")
    assert sorted(task.alphabet) == sorted("MKVLA-") and rows(task)[0] == ["MKV---", "MKVLAA"]


@pytest.mark.parametrize("content, more, message", [
    ("ACGT\nACG\n", {}, "data.txt line 2 has 3 letters, --task=dna 4 slots: fill up with --pad=-, or choose --length=3"),
    ("ACGT\nACGTA\n", {}, "data.txt line 2 has 5 letters, --task=dna 4 slots: cut windows with --crop, or choose --length=5"),
    ("ACGT\nACGTA\n", dict(pad="-"), "line 2 has 5 letters"), ("ACGT\nACG\n", dict(crop=True), "line 2 has 3 letters"),
    ("ACGT\n\nACGT\n", {}, "data.txt line 2 is empty"), (">a\n>b\nACGT\n", {}, "data.txt line 1 is empty"),
    ("ACGT\nACNT\n", {}, "'N' at position 3 of .*data.txt line 2 is not in the alphabet 'ACGT'"),
    ("ACGT\nA_GT\n", {}, "'_' at position 2 of .*data.txt line 2 is not in"),
    (">x\nAC\nXT\n", {}, "'X' at position 3 of .*data.txt line 1 is not in"),
    ("", {}, "data.txt is empty"), ("\n \n", {}, "data.txt is empty"), (b"\xff\xfe\x00A", {}, "data.txt is not text"),
    ("ACGT", dict(pad="--"), "--pad=--: one letter is needed"), ("ACGT", dict(pad="A"), "--pad=A is a letter of --task=dna"),
])
def test_files_that_cannot_be_used_get_a_line(content, more, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        open_task("dna", 4, write(tmp_path, content), **more)


def test_missing_and_torn_files_and_flags_that_need_one(tmp_path):
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"ACGT" * 1000)[:30])
    (tmp_path / "no.gz").write_text("ACGT")
    for file, message in (("none.txt", "No such file"), ("torn.gz", "ended before"), ("no.gz", "Not a gzipped file"),
                          ("", "Is a directory")):
        with pytest.raises(BadInput, match=f"--data=.*{message}"):
            open_task("dna", 4, str(tmp_path / file) if file else str(tmp_path))
    for more, message in ((dict(crop=True), "--crop is for"), (dict(pad="-"), "--pad is for")):
        with pytest.raises(BadInput, match=message):
            open_task("dna", **more)
    with pytest.raises(BadInput, match="--length=7: --task=toy has 6 slots"):
        open_task("toy", 7)
    with pytest.raises(BadInput, match="--length=2: --task=dna needs 3 slots"):
        open_task("dna", 2)
    with pytest.raises(BadInput, match="data.txt has 5 letters, --task=text 48 slots"):
        open_task("text", 0, write(tmp_path, "short"))


# ---- the user's own reward ------------------------------------------------------------------------------------------------

def test_a_reward_from_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("LETTER = 'G'\n")
    (tmp_path / "own.py").write_text("from neighbour import LETTER\ndef count(samples):\n"
                                     "    return [s.count(LETTER) / len(s) for s in samples]\n")
    task = open_task("toy", reward=f"{tmp_path / 'own.py'}:count")
    assert ask(task, task.encode(["GGGCCC", "AAAAAG"])).tolist() == pytest.approx([1 / 2, 1 / 6])
    assert TASKS["toy"].reward is rewards.toy_reward


@pytest.mark.parametrize("code, name, message", [
    ("", "own.py", "own.py: file.py:function is needed"), ("", "own.txt:score", "file.py:function is needed"),
    ("", "other.py:score", "other.py does not exist"), ("x = 1", "own.py:score", "own.py has no function score"),
    ("score = 1", "own.py:score", "has no function score"), ("1 / 0", "own.py:score", "raised ZeroDivisionError"),
    ("import nowhere", "own.py:score", "raised ModuleNotFoundError: No module named 'nowhere'"),
    ("def score(s) return 1", "own.py:score", "raised SyntaxError"), ("import sys; sys.exit(1)", "own.py:score", "SystemExit"),
])
def test_reward_files_that_cannot_be_used_get_a_line(code, name, message, tmp_path):
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(BadInput, match=message) as error:
        open_task("toy", reward=str(tmp_path / name))
    assert "\n" not in str(error.value)
