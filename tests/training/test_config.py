import pytest

from llmos_fast.training import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("batch_size", 0, "be at least 1"),
        ("bptt", -3, "be at least 1"),
        ("epochs", 2.5, "be of type int"),
        ("seed", True, "be of type int"),
        ("max_steps", -1, "be at least 0"),
        ("learning_rate", 0.0, "be above 0"),
        ("learning_rate", float("nan"), "be above 0"),
        ("learning_rate", "fast", "be of type float"),
        ("clip_norm", -0.5, "be at least 0"),
        ("decay", 1.5, "be above 0 and at most 1"),
        ("accumulation", 21, "be at most batch_size"),
        ("optimizer", "lion", "be one of adamw, adam, sgd"),
        ("schedule", "cosine", "be one of constant, step, inverse_sqrt"),
        ("precision", "float16", "be one of float32, bfloat16"),
    ],
    ids=str,
)
def test_refuses(field, value, rule):
    with pytest.raises(ValueError, match=f"TrainingConfig: {field} must {rule}, got {value!r}"):
        TrainingConfig(**{field: value})


def test_an_int_is_a_number():
    assert TrainingConfig(learning_rate=5, clip_norm=0).learning_rate == 5
