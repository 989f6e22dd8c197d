import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import config_rules, config_text
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import ConfigError


def with_fields(**fields):
    """The default config with dotted fields (`__` for the dot) set."""
    config = ExperimentConfig()
    for path, value in fields.items():
        *groups, name = path.split("__")
        holder = config
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, name, value)
    return config


VIT = dict(model__kind="vit", model__positions__kind="learned", data__source="digits", data__task="classification")
PAIRED = dict(model__kind="encoder_decoder", data__task="ul2")

REFUSED = [
    # choices, with the nearest name
    (dict(model__kind="decodre"), ["model.kind = 'decodre'", "Did you mean 'decoder'?"]),
    (dict(model__block="sandwhich"), ["model.block", "'sandwhich'", "'sandwich'"]),
    (dict(model__dtype="bf16"), ["model.dtype = 'bf16'", "'float32', 'bfloat16'"]),
    (dict(model__norm__kind="rmsnorm"), ["model.norm.kind", "Did you mean 'rms'?"]),
    (dict(model__attention__backend="flash"), ["model.attention.backend", "'cudnn'"]),
    (dict(model__remat="dot"), ["model.remat", "'dot'", "Did you mean 'dots'?"]),
    (dict(model__positions__kind="rotary"), ["model.positions.kind", "'rope'"]),
    (dict(model__attention_pattern=("global", "locl")), ["model.attention_pattern[1]", "Did you mean 'local'?"]),
    (dict(optimizer__schedule="cosin"), ["optimizer.schedule", "Did you mean 'cosine'?"]),
    (dict(optimizer__decay_roles=("matrices",)), ["optimizer.decay_roles[0]", "Did you mean 'matrix'?"]),
    (dict(log__writers=("csv", "csv")), ["log.writers[1]", "given twice"]),
    (dict(checkpoint__on_nan="ignore"), ["checkpoint.on_nan", "'skip'"]),
    # names in the registries
    (dict(objectives=("crossentropy",)), ["objectives[0]", "Did you mean 'cross_entropy'?"]),
    (dict(objectives=("cross_entropy", "cross_entropy")), ["objectives[1]", "given twice"]),
    (dict(objectives=()), ["objectives = ()", "empty"]),
    (dict(model__ffn__activation="rleu2"), ["model.ffn.activation", "Did you mean 'relu2'?"]),
    (dict(model__feed_pattern=("ffm",)), ["model.feed_pattern[0]", "Did you mean 'ffn'?"]),
    (dict(model__feed_pattern=("moe:expert=4",)), ["model.feed_pattern[0]", "'expert'", "Did you mean 'experts'?"]),
    (dict(model__feed_pattern=("moe:experts=2,k=3",)), ["model.feed_pattern[0]", "k = 3"]),
    (dict(data__source="stdlb"), ["data.source", "Did you mean 'stdlib'?"]),
    (dict(data__tokenizer="byte"), ["data.tokenizer", "Did you mean 'bytes'?"]),
    (dict(data__tokenizer="bpe:many"), ["data.tokenizer", "bpe.vocab", "'many'"]),
    (dict(data__task="casual_lm"), ["data.task", "Did you mean 'causal_lm'?"]),
    (dict(optimizer__name="adamww"), ["optimizer.name = 'adamww'", "Did you mean 'adamw'?"]),
    (dict(optimizer__arguments="b3=0.9"), ["optimizer.arguments", "'b3'", "'b2'"]),
    (dict(optimizer__name="sgd"), ["optimizer.weight_decay", "sgd has none"]),
    (dict(model__init="normal:big"), ["model.init", "normal:STD"]),
    (dict(model__positions__rope__scaling="linear"), ["model.positions.rope.scaling", "linear:FACTOR"]),
    (dict(model__positions__rope__scaling="llama3:8,1,4,-1"), ["model.positions.rope.scaling", "positive"]),
    # bounds
    (dict(steps=0), ["steps = 0", "at least 1"]),
    (dict(seed=-1), ["seed = -1", "at least 0"]),
    (dict(optimizer__learning_rate=0.0), ["optimizer.learning_rate", "more than 0"]),
    (dict(optimizer__ema_decay=1.0), ["optimizer.ema_decay", "less than 1"]),
    (dict(optimizer__final_fraction=1.5), ["optimizer.final_fraction", "at most 1"]),
    (dict(checkpoint__keep=0), ["checkpoint.keep"]),
    (dict(checkpoint__spike_factor=0.5), ["checkpoint.spike_factor", "more than 1"]),
    (dict(name="a/b"), ["name = 'a/b'", "folder"]),
    # types
    (dict(steps="100"), ["steps = '100'", "expected int", "str"]),
    (dict(steps=True), ["steps = True", "expected int", "bool"]),
    (dict(steps=1e2), ["steps = 100.0", "expected int", "float"]),
    (dict(optimizer__learning_rate=float("nan")), ["optimizer.learning_rate", "finite"]),
    (dict(model__scan=1), ["model.scan = 1", "expected bool"]),
    (dict(objectives="cross_entropy"), ["objectives", "expected a tuple"]),
    (dict(model__inputs=(1,)), ["model.inputs[0] = 1", "expected str"]),
    (dict(model={"num_layers": 4}), ["model = ", "ModelConfig"]),
    (dict(model__num_layer=3), ["model.num_layer:", "Did you mean 'num_layers'?"]),
    # widths and heads
    (dict(model__attention__num_heads=5), ["model.attention.num_heads = 5", "d_model = 128"]),
    (dict(model__attention__num_kv_heads=3), ["model.attention.num_kv_heads = 3", "num_heads = 4"]),
    (dict(model__attention__head_dim=7), ["model.attention.head_dim = 7", "even"]),
    (dict(model__positions__rope__fraction=0.3), ["model.attention.head_dim = 32", "even"]),
    (dict(model__inputs=("blocks.*.mlp.down=topk:k=513",)), ["model.inputs[0]", "513", "512"]),
    (dict(model__inputs=("blocks.*.mlp.dwon=int8",)), ["model.inputs[0]", "Did you mean 'blocks.*.mlp.down'?"]),
    (dict(model__inputs=("blocks.9.attn.q=int8",)), ["model.inputs[0]", "no linear map"]),
    (dict(model__weights=("blocks.**=int8", "blocks.0.attn.q=int4")), ["model.weights[1]", "earlier rules"]),
    (dict(model__weights=("blocks.**",)), ["model.weights[0]", "SITE_GLOB=OP"]),
    (dict(model__weights=("blocks.**=int9",)), ["model.weights[0]", "'int9'", "Did you mean 'int"]),
    # combinations
    (dict(model__attention__window=16), ["model.attention.window = 16", "'local'"]),
    (dict(model__attention_pattern=("local", "global")), ["model.attention.window = 0", "'local'"]),
    (dict(model__positions__rope__local_theta=1e5), ["local_theta", "'local'"]),
    (dict(model__positions__kind="relative", model__positions__rope__scaling="linear:2"), ["rope.scaling", "'relative'"]),
    (dict(model__positions__offset=2), ["model.positions.offset", "'rope'"]),
    (dict(model__norm__bias=True), ["model.norm.bias", "'rms'"]),
    (dict(model__block="sandwich", model__norm__kind="none"), ["model.block", "'none'"]),
    (dict(model__attention__qk_norm_over="projection"), ["model.attention.qk_norm_over", "qk_norm"]),
    (dict(model__head=False), ["model.head", "trains"]),
    (dict(model__head=False, model__head_bias=True), ["model.head_bias", "model.head is False"]),
    (dict(model__head=False, model__tied_embeddings=False), ["model.tied_embeddings", "model.head is False"]),
    (dict(model__head_transform=True, model__ffn__activation="swiglu"), ["model.head_transform", "swiglu"]),
    (dict(model__feed_pattern=("ffn:gelo",)), ["model.feed_pattern[0]", "gelo", "gelu"]),
    (dict(model__token_types=2), ["model.token_types", "'encoder'"]),
    (dict(model__encoder_layers=2), ["model.encoder_layers", "'decoder'"]),
    (dict(model__vocab_size=100), ["model.vocab_size = 100", "tokenizer", "264"]),
    (dict(model__num_classes=3), ["model.num_classes", "causal_lm"]),
    (dict(model__max_length=64), ["model.max_length = 64", "128"]),
    (dict(data__task="masked_lm"), ["data.task", "model.kind = 'decoder'", "'encoder'"]),
    (dict(data__source="digits"), ["data.source = 'digits'", "images"]),
    (dict(data__source="mqar", data__sequence_length=8), ["data.sequence_length = 8", "16"]),
    ({**VIT, "data__task": "causal_lm"}, ["data.task", "'vit'"]),
    ({**VIT, "data__source": "stdlib"}, ["data.source = 'stdlib'", "text"]),
    ({**VIT, "model__vision__patch_size": 3}, ["model.vision.patch_size = 3", "image_size = 8"]),
    ({**VIT, "model__positions__kind": "rope"}, ["model.positions.kind", "'learned'"]),
    ({**VIT, "model__pool": "class", "model__vision__class_token": False}, ["model.pool", "class_token"]),
    (dict(data__source="listops", data__task="classification", model__pool="class"), ["model.pool = 'class'", "'mean'"]),
    ({**VIT, "evaluate__sample_tokens": 10}, ["evaluate.sample_tokens", "'vit'"]),
    ({**PAIRED, "data__task": "causal_lm"}, ["data.task", "'encoder_decoder'"]),
    ({**PAIRED, "model__block": "parallel"}, ["model.block", "cross-attention"]),
    (dict(checkpoint__on_nan="rollback"), ["checkpoint.every = 0", "rollback"]),
    (dict(accumulate=3), ["batch_size = 16", "accumulate = 3"]),
    # meshes
    (dict(mesh__data=0), ["mesh.data = 0"]),
    (dict(mesh__fsdp=-1), ["data and fsdp", "-1"]),
    (dict(mesh__data=1, mesh__tensor=3), ["mesh", "3"]),
    (dict(batch_size=12), ["batch_size = 12", "8"]),
    (dict(mesh__tensor=8), ["model.attention.num_heads = 4", "mesh.tensor = 8"]),
    (dict(mesh__expert=4, model__feed_pattern=("moe:experts=6",)), ["model.feed_pattern[0]: experts = 6", "mesh.expert = 4"]),
    (dict(mesh__sequence=8, data__sequence_length=100), ["data.sequence_length = 100", "mesh.sequence = 8"]),
]


@pytest.mark.parametrize(("fields", "parts"), REFUSED, ids=[str(f)[:60] for f, _ in REFUSED])
def test_a_config_that_cannot_be_used_is_refused_in_the_users_terms(fields, parts):
    with pytest.raises(ConfigError) as caught:
        finalize(with_fields(**fields), device_count=8)
    for part in parts:
        assert part in str(caught.value)


USABLE = [
    {},
    dict(model__attention__num_kv_heads=1),
    dict(model__attention_pattern=("local", "local", "global"), model__attention__window=32),
    dict(model__positions__rope__scaling="llama3:8,1,4,8192"),
    dict(model__positions__kind="learned", model__positions__offset=2),
    dict(model__block="parallel", model__norm__kind="layer", model__norm__bias=True),
    dict(model__norm__kind="none"),
    dict(optimizer__name="muon", optimizer__arguments="ns_steps=3"),
    dict(optimizer__name="sgd", optimizer__weight_decay=0.0, optimizer__arguments="momentum=0.9,nesterov=true"),
    dict(data__source="listops", data__task="classification", model__kind="encoder"),
    dict(model__weights=("blocks.0.attn.q=int4", "blocks.**=int8"), model__inputs=("blocks.*.mlp.down=topk:k=512",)),
    {**VIT, "model__inputs": ("head=int8",), "model__head_bias": True},
    dict(model__head_bias=True, model__head_transform=True, model__ffn__activation="gelu"),
    dict(data__tokenizer="file:not-opened.json", model__tied_embeddings=False, model__weights=("head=int8",)),
    VIT,
    PAIRED,
]


@pytest.mark.parametrize("fields", USABLE, ids=str)
def test_a_usable_config_is_completed_and_completing_it_again_changes_nothing(fields):
    config = finalize(with_fields(**fields), num_classes=10 if fields is VIT else None)
    a = config.model.attention
    assert a.num_kv_heads and a.head_dim and config.model.ffn.hidden and config.model.max_length
    assert finalize(config, device_count=1) == config
    assert finalize(copy.deepcopy(config)) == config


def test_finalize_leaves_its_argument_as_it_is():
    config = with_fields(optimizer__learning_rate=1)
    before = copy.deepcopy(config)
    resolved = finalize(config)
    assert config == before
    assert type(resolved.optimizer.learning_rate) is float
    resolved.model.ffn.hidden = 1
    assert config == before


def test_what_only_the_data_knows_completes_the_config():
    config = with_fields(data__tokenizer="file:not-opened.json")
    assert finalize(config).model.vocab_size == 0
    assert finalize(config, vocab_size=1000).model.vocab_size == 1000
    with pytest.raises(ConfigError, match="needs 1000"):
        finalize(with_fields(data__tokenizer="file:not-opened.json", model__vocab_size=999), vocab_size=1000)
    assert finalize(with_fields(**VIT), num_classes=10).model.num_classes == 10
    assert finalize(with_fields(data__source="mqar:symbols=96")).model.vocab_size == 100


@pytest.mark.parametrize(("shape", "field"), [((28, 28, 1), "image_size"), ((8, 6, 1), "image_size"), ((8, 8, 3), "channels")])
def test_images_that_the_model_is_not_made_for_are_refused(shape, field):
    assert finalize(with_fields(**VIT), image_shape=(8, 8, 1)).model.vision.image_size == 8
    with pytest.raises(ConfigError, match=f"model.vision.{field} = .*{shape[0]} x {shape[1]} x {shape[2]}"):
        finalize(with_fields(**VIT), image_shape=shape)


def test_the_mesh_is_checked_against_the_devices_only_where_their_number_is_known():
    config = with_fields(mesh__data=1, mesh__tensor=4)
    assert finalize(config) == finalize(config, device_count=4)
    with pytest.raises(ConfigError, match="8"):
        finalize(config, device_count=8)


def test_every_field_has_a_rule():
    tables = (config_rules.CHOICES, config_rules.ITEM_CHOICES, config_rules.BOUNDS, config_rules.FREE_TEXT, config_rules.SPECS)
    ruled = {path for table in tables for path in table}
    fields = config_text.leaves(ExperimentConfig())
    assert ruled == {path for path, value in fields.items() if not isinstance(value, bool)}


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adafactor", "adam", "schedule_free_adamw", "prodigy"])
def test_optimizers_of_optax_are_found_by_name(optimizer):
    decays = optimizer not in ("adam", "adafactor")
    schedule = "constant" if optimizer.startswith("schedule_free") else "cosine"
    fields = dict(optimizer__name=optimizer, optimizer__weight_decay=0.1 * decays, optimizer__schedule=schedule)
    assert finalize(with_fields(**fields)).optimizer.name == optimizer


# Text, JSON, comparison


def test_a_config_survives_json():
    config = with_fields(model__inputs=("a=b|c", "d=e"), optimizer__learning_rate=1e-7, name="snow ☃")
    back = config_text.from_json(config_text.to_json(config), ExperimentConfig)
    assert back == config
    assert type(back.model.inputs) is tuple


@given(st.data())
def test_any_single_change_survives_json_and_shows_in_the_diff(data):
    base = ExperimentConfig()
    leaves = config_text.leaves(base)
    path = data.draw(st.sampled_from(sorted(leaves)))
    values = {
        bool: st.booleans(),
        int: st.integers(-(2**40), 2**40),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
        tuple: st.lists(st.text(max_size=8), max_size=3).map(tuple),
    }
    value = data.draw(values[type(leaves[path])])
    config = with_fields(**{path.replace(".", "__"): value})
    assert config_text.from_json(config_text.to_json(config), ExperimentConfig) == config
    assert config_text.diff(config, base) == ([] if value == leaves[path] else [f"{path}: {leaves[path]!r} -> {value!r}"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["run/config.json", "not JSON"]),
        ('{"steps": 1', ["run/config.json", "not JSON"]),
        ("[]", ["run/config.json", "expected a JSON object"]),
        ('{"stpes": 1}', ["run/config.json", "stpes", "Did you mean 'steps'?"]),
        ('{"model": {"num_layer": 1}}', ["model.num_layer", "Did you mean 'num_layers'?"]),
        ('{"model": 3}', ["model = 3", "expected a JSON object"]),
        ('{"steps": "many"}', ["steps = 'many'", "expected int"]),
        ('{"objectives": [1]}', ["objectives[0]", "expected str"]),
        ('{"optimizer": {"learning_rate": NaN}}', ["optimizer.learning_rate", "finite"]),
    ],
)
def test_a_damaged_saved_config_is_refused_by_file_and_key(text, parts):
    with pytest.raises(ConfigError) as caught:
        config_text.from_json(text, ExperimentConfig, "run/config.json")
    for part in parts:
        assert part in str(caught.value)


def test_a_field_that_a_saved_config_lacks_keeps_its_default():
    assert config_text.from_json('{"steps": 7}', ExperimentConfig) == with_fields(steps=7)


def test_the_text_has_one_line_per_field_in_order():
    lines = config_text.to_text(ExperimentConfig()).splitlines()
    assert [line.partition(" = ")[0] for line in lines] == list(config_text.leaves(ExperimentConfig()))
    assert "model.attention.num_heads = 4" in lines


def test_a_run_folder_of_another_config_is_refused_by_its_fields():
    saved = finalize(ExperimentConfig())
    with pytest.raises(ConfigError) as caught:
        config_text.require_same(finalize(with_fields(seed=3, model__num_layers=6, log__every=1)), saved, "runs/first")
    message = str(caught.value)
    assert "runs/first" in message
    assert "seed: 0 in the folder, 3 now" in message
    assert "model.num_layers: 4 in the folder, 6 now" in message
    assert "log.every" not in message


def test_what_may_change_on_resume_is_not_compared():
    saved = finalize(ExperimentConfig())
    config_text.require_same(finalize(with_fields(mesh__fsdp=2, log__every=1, checkpoint__keep=5, model__unroll=2)), saved)
    with pytest.raises(ConfigError, match="steps"):
        config_text.require_same(finalize(with_fields(steps=101)), saved)
    config_text.require_same(finalize(with_fields(steps=101)), saved, ignore=("steps",))


def test_globs_of_what_may_change_name_fields():
    import fnmatch

    paths = config_text.leaves(ExperimentConfig())
    assert all(fnmatch.filter(paths, glob) for glob in config_text.RESUME_MAY_CHANGE)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("model.num_layer", "'model.num_layers'"),
        ("num_layers", "'model.num_layers'"),
        ("modle.num_layers", "'model.num_layers'"),
        ("learning_rate", "'optimizer.learning_rate'"),
        ("optimizer.lr", "optimizer has name, arguments, learning_rate"),
        ("model.attention.heads", "'model.attention.num_heads'"),
    ],
)
def test_an_unknown_field_gets_the_nearest_one_wherever_it_stands(path, nearest):
    with pytest.raises(ConfigError) as caught:
        config_text.check_path(ExperimentConfig, path)
    assert nearest in str(caught.value)


def test_field_types_are_what_config_flags_can_read():
    for cls in (ExperimentConfig, ModelConfig):
        for field in dataclasses.fields(cls):
            assert not isinstance(field.type, str), "postponed annotations hide the type from config_flags"
