"""The adapter for lm-eval: its answers against our own scores, and against lm-eval itself where that is installed."""

import json
import sys
import types

import numpy as np
import pytest

from sparsejax.evaluate.lm_eval_adapter import Responder, lm_eval_model, rolling_rows
from sparsejax.evaluate.scoring import Scorer
from sparsejax.evaluate.tasks import encode_task, open_task, score_task
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import LENGTH, random_model, slow_log_probabilities, slow_score, tokenizer

ROWS = [
    {"query": "Which is dry?", "choices": ["sea", "a desert", "fog é"], "gold": 1},
    {"query": "Which is wet?", "choices": ["rain", "sand", "x"], "gold": 0},
    {"query": "Up or", "choices": ["down", "x", "yy"], "gold": 2},
]


@pytest.fixture(scope="module")
def model():
    return random_model(num_layers=1)


@pytest.fixture(scope="module")
def responder(model):
    return Responder(model)


def requests(*arguments):
    """What the adapter reads of `lm_eval.api.instance.Instance`."""
    return [types.SimpleNamespace(args=args) for args in arguments]


def test_a_continuation_scores_as_the_same_row_of_a_task(model, responder, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    encoded = encode_task(open_task("jsonl", str(path), []), model.tokenizer, LENGTH, 0)
    ours = Scorer(model).score(encoded.rows)
    theirs = responder.loglikelihood(requests(*[(r["query"], f" {c}") for r in ROWS for c in r["choices"]]), disable_tqdm=True)
    assert [-log_p for log_p, _ in theirs] == ours.nll.tolist()
    assert [greedy for _, greedy in theirs] == ours.greedy.tolist()


def test_a_long_context_loses_its_beginning(model, responder):
    context = "abcdefgh" * 9
    ((log_p, _),) = responder.loglikelihood(requests((context, " end")), disable_tqdm=True)
    tokens = tokenizer().encode(f"{context} end")[-LENGTH - 1 :]
    np.testing.assert_allclose(-log_p, slow_score(model, tokens, len(tokens) - 4)[0], rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 21])
def test_rolling_rows_predict_each_token_once_with_the_last_stretch_at_full_context(count):
    rows = rolling_rows(np.arange(1, count + 1), 0, 8)
    assert [t for row in rows for t in row.tokens[row.start :]] == list(range(1, count + 1))
    assert all((np.diff(row.tokens) == 1).all() and len(row.tokens) <= 9 for row in rows)
    assert count <= 8 or len(rows[-1].tokens) == 9


def test_rolling_scores_are_sums_over_the_stretches_of_a_text(model, responder):
    text = "the cat sat on the mat. " * 3
    found = responder.loglikelihood_rolling(requests((text,), ("",), ("ab",)), disable_tqdm=True)
    ids, expected = tokenizer().encode(text), 0.0
    for begin in range(0, len(ids), LENGTH):
        piece = np.concatenate([[tokenizer().bos_id], ids])[: min(begin + LENGTH, len(ids)) + 1][-LENGTH - 1 :]
        expected += slow_score(model, piece, len(piece) - len(ids[begin : begin + LENGTH]))[0]
    np.testing.assert_allclose(found[0], -expected, rtol=1e-5)
    assert found[1] == 0.0 and found[2] < 0


def test_generation_is_greedy_and_stops_before_a_stop_string():
    model = random_model(num_layers=1)
    model.values["embed"]["table"] = model.values["embed"]["table"].at[128:].set(0)  # the likeliest token is ASCII
    responder = Responder(model)
    tokens = tokenizer().encode("ab").tolist()
    for _ in range(6):
        tokens.append(int(slow_log_probabilities(model, [*tokens, 0], LENGTH - len(tokens))[-1].argmax()))
    expected = bytes(tokens[2:]).decode()
    plain, stopped = {"max_gen_toks": 6}, {"max_gen_toks": 6, "until": [expected[3:5]], "do_sample": False}
    whole, cut, other, again = responder.generate_until(requests(("ab", plain), ("ab", stopped), ("b", plain), ("ab", plain)))
    assert whole == again == expected != other and cut == expected[: expected.index(expected[3:5])]


def test_what_cannot_be_answered_is_refused(model, monkeypatch):
    with pytest.raises(ConfigError, match="max_gen_toks = 48"):
        Responder(model).generate_until(requests(("a", {"max_gen_toks": 48})))
    with pytest.raises(ConfigError, match="--model = 'tiny': is of kind 'encoder'"):
        Responder(random_model(num_layers=1, kind="encoder"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="lm-eval is not installed"):
        lm_eval_model(model)


def test_lm_eval_itself_reports_the_same_accuracies(model, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is optional and not installed")
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_bytes")]
    task = dict(task="ours", dataset_path="json", dataset_kwargs={"data_files": {"test": str(path)}}, test_split="test",
                output_type="multiple_choice", doc_to_text="query", doc_to_choice="choices", doc_to_target="gold",
                metric_list=metrics)  # fmt: skip
    found = lm_eval.simple_evaluate(model=lm_eval_model(model), tasks=[task], bootstrap_iters=0)["results"]["ours"]
    ours = score_task(Scorer(model), encode_task(open_task("jsonl", str(path), []), model.tokenizer, LENGTH, 0)).numbers
    assert found["acc,none"] == pytest.approx(ours["acc"]) and found["acc_bytes,none"] == pytest.approx(ours["acc_norm"])
