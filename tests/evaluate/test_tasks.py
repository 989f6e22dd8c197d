"""Tasks from JSON lines: what is read, how it is tokenized, and the scores against one-by-one scoring."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.sources import data_directories
from sparsejax.data.tokenizers import BASE_SPECIALS, LibraryCodec, _append_specials, train_bpe
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.evaluate.tasks import blank_between, encode_pairs, encode_task, open_task, read_rows, score_task, truncate
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import LENGTH, random_model, slow_log_probabilities, slow_score, tokenizer

CHOICES = [
    {"query": "Which is dry?", "choices": ["sea", "a desert", "fog é"], "gold": 1},
    {"query": "Which is wet?", "choices": ["rain", "sand"], "gold": 0, "source": "extra keys are fine"},
    {"query": "Up or", "choices": ["down", "x", "yy"], "gold": 0},
]
CLOZE = [{"context": "one two", "continuation": "three"}, {"context": "", "continuation": "x"}]
CONTEXTS = [
    {"context_options": ["Ann beat Bo, so Ann", "Ann beat Bo, so Bo"], "continuation": "was glad.", "gold": 0},
    {"context_options": ["It is", "They are", "He"], "continuation": "here", "gold": 2},
]


@pytest.fixture(scope="module")
def model():
    return random_model(num_layers=1)


@pytest.fixture(scope="module")
def bpe():
    codec = LibraryCodec(train_bpe(["the cat sat on the mat and the dog sat on the log " * 9], 300))
    return _append_specials(codec, 300 + len(BASE_SPECIALS), 0)


def write(folder, rows, name="task.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def run(model, task, limit=0, batch=3):
    return score_task(Scorer(model, batch), encode_task(task, model.tokenizer, model.config.max_length, limit))


def slow_pair(model, context, continuation):
    """Bytes are tokens here, so that tokenizing together and apart is the same."""
    head = model.tokenizer.encode(context).tolist() or [model.tokenizer.bos_id]
    tokens = np.array(head + model.tokenizer.encode(continuation).tolist())
    return slow_score(model, tokens, len(head), padding=LENGTH + 1 - len(tokens))


def test_choices_are_ranked_by_likelihood_and_by_likelihood_per_byte(model, tmp_path):
    task = open_task("jsonl", write(tmp_path, CHOICES), [])
    result = run(model, task)
    plain, by_byte = [], []
    for row in CHOICES:
        nll = np.array([slow_pair(model, row["query"], f" {choice}")[0] for choice in row["choices"]])
        plain.append(nll.argmin() == row["gold"])
        by_byte.append((nll / [len(choice.encode()) for choice in row["choices"]]).argmin() == row["gold"])
    assert result.correct.tolist() == plain
    assert result.numbers["acc"] == np.mean(plain) and result.numbers["acc_norm"] == np.mean(by_byte)
    assert math.isclose(result.numbers["acc_error"], np.std(plain, ddof=1) / math.sqrt(3))


def test_a_cloze_counts_what_greedy_decoding_gives(tmp_path):
    model = random_model(num_layers=1)
    model.values["embed"]["table"] = model.values["embed"]["table"].at[128:].set(0)  # the likeliest token is ASCII
    tokens = [model.tokenizer.bos_id]
    for _ in range(3):
        tokens.append(int(slow_log_probabilities(model, [*tokens, 0], LENGTH - len(tokens))[-1].argmax()))
    greedy = bytes(tokens[1:]).decode()
    rows = [*CLOZE, {"context": "", "continuation": greedy}]
    result = run(model, open_task("jsonl", write(tmp_path, rows), []))
    scores = [slow_pair(model, "one two", " three"), slow_pair(model, "", "x"), slow_pair(model, "", greedy)]
    assert result.correct.tolist() == [hit for _, hit in scores] and scores[2][1]
    nll = np.array([nll for nll, _ in scores])
    np.testing.assert_allclose(result.numbers["perplexity"], np.exp(nll.mean()), rtol=1e-4)
    np.testing.assert_allclose(
        result.numbers["perplexity_error"], np.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(3), rtol=1e-4
    )


def test_partial_contexts_are_compared_on_the_same_continuation(model, tmp_path):
    result = run(model, open_task("jsonl", write(tmp_path, CONTEXTS), []))
    expected = []
    for row in CONTEXTS:
        nll = [slow_pair(model, context, " " + row["continuation"])[0] for context in row["context_options"]]
        expected.append(np.argmin(nll) == row["gold"])
    assert result.correct.tolist() == expected and set(result.numbers) == {"acc", "acc_error"}


def test_a_limit_takes_the_first_rows(model, tmp_path):
    task = open_task("jsonl", write(tmp_path, CHOICES), [])
    assert run(model, task, limit=2).correct.tolist() == run(model, task).correct.tolist()[:2]


@pytest.mark.parametrize(
    ("context", "continuation", "blank"),
    [("Q?", "yes", " "), ("Q? ", "yes", ""), ("Q?", " yes", ""), ("Q?\nA:", "yes", " "), ("Q\n", "yes", ""), ("", "yes", "")],
)
def test_a_blank_is_put_between_where_there_is_none(context, continuation, blank):
    assert blank_between(context, continuation) == blank


def harness_encoding(context, continuation, reader):
    """lm-eval 0.4.13, TemplateLM._encode_pair and loglikelihood, for a tokenizer without specials."""
    if context == "":
        tokens = reader.encode(continuation).tolist()
        return ([reader.bos_id], tokens) if tokens[0] != reader.bos_id else (tokens[:1], tokens[1:])
    blanks = len(context) - len(context.rstrip())
    if blanks > 0:
        continuation = context[-blanks:] + continuation
        context = context[:-blanks]
    whole, before = reader.encode(context + continuation).tolist(), reader.encode(context).tolist()
    return before, whole[len(before) :]


@given(
    st.text(alphabet="the catsondg é\n", max_size=20).filter(lambda s: not s or s.strip()),
    st.sampled_from([" cat", " sat on", "e dog", " ", " the mat"]),
)
def test_context_and_continuation_are_tokenized_as_lm_eval_does(bpe, context, continuation):
    before, after = harness_encoding(context, continuation, bpe)
    if not after:
        with pytest.raises(ConfigError, match="row 7.*adds no token"):
            encode_pairs([(context, continuation)], bpe, ["row 7"])
        return
    ((tokens, start),) = encode_pairs([(context, continuation)], bpe, ["row 7"])
    # Where the boundary merges, the harness scores what follows as many tokens as the context alone has.
    assert tokens[start:].tolist() == after
    assert context == "" or tokens.tolist() == bpe.encode(context + continuation).tolist()
    assert context != "" or tokens[:start].tolist() == before


def test_long_contexts_lose_their_beginning_and_are_counted(model, tmp_path):
    context = "".join(chr(97 + i % 26) for i in range(100))
    path = write(tmp_path, [{"context": context, "continuation": "end"}, CLOZE[0]])
    encoded = encode_task(open_task("jsonl", path, []), tokenizer(), 48, 0)
    assert encoded.truncated == 1
    assert text_of(encoded.rows[0]) == f"{context} end"[-49:] and encoded.rows[0].start == 45
    assert text_of(encoded.rows[1]) == "one two three"
    with pytest.raises(ConfigError, match="file:3 = 57: the continuation has more tokens than the model takes"):
        truncate([Row(np.zeros(60, np.int32), 3)], 48, ["file:3"])


def text_of(row):
    return bytes(row.tokens.astype(np.uint8)).decode()


def test_a_file_is_found_by_the_tasks_name(tmp_path):
    write(tmp_path, CHOICES, "arc_easy_500.jsonl")
    task = open_task("arc_easy", "", [tmp_path])
    assert task.path.endswith("arc_easy_500.jsonl") and task.rows[0].pairs[1] == ("Which is dry? ", "a desert")
    write(tmp_path, CHOICES, "arc_easy.jsonl")
    with pytest.raises(ConfigError, match="all fit; give arc_easy:PATH"):
        open_task("arc_easy", "", [tmp_path])
    with pytest.raises(ConfigError, match="no piqa.jsonl or piqa_"):
        open_task("piqa", "", [tmp_path])
    with pytest.raises(ConfigError, match="jsonl:PATH"):
        open_task("jsonl", "", [tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 0', "not JSON"),
        ("[1]", "a list; a row is one of"),
        ('{"question": "a", "gold": 1}', "keys 'question', 'gold'; a row is one of"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold = 2: expected the number of the right one, 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "gold = -1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold = True"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "B"}', "gold = 'B'"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "choices = .* two or more"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "not blank"),
        ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "query = 3: expected a text"),
        ('{"context": "a", "continuation": "b"}', r"a row \{context, continuation\} among rows \{query, choices, gold\}"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path, [CHOICES[0], "", line])
    with pytest.raises(ConfigError, match=rf"task\.jsonl:3: .*{message}"):
        open_task("jsonl", path, [])


def test_files_without_rows_or_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows("\n \n", "x.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9"}')
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        open_task("jsonl", str(tmp_path / "latin.jsonl"), [])
    with pytest.raises(ConfigError, match="Did you mean 'winogrande'"):
        open_task("winogrand_e", "", [])


def test_the_shipped_sample_of_arc_easy_is_read():
    found = [d / "arc_easy_500.jsonl" for d in data_directories() if (d / "arc_easy_500.jsonl").is_file()]
    if not found:
        pytest.skip("no data folder with arc_easy_500.jsonl")
    task = open_task("arc_easy", "", [Path(found[0]).parent])
    assert len(task.rows) == 500 and task.shape == "choices"
    assert all(context.startswith("Question: ") for row in task.rows for context, _ in row.pairs)
