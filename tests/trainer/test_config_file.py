import itertools

import pytest

from papilio.trainer.config import table_name
from papilio.trainer.config_file import ConfigError, load_config, shipped_recipes

MINIMAL = 'name = "small"\n[data]\npath = "somewhere"\n'


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return str(path)


def test_overrides_win_over_the_recipe_and_the_last_one_over_all(recipe):
    config = load_config(
        recipe,
        [
            "--train.epochs=2",
            "--train.epochs=3",
            "--optimizer.dense.learning_rate=1e-3",
            "--data.path=/elsewhere",
            "--model.over_arch_layer_sizes=[8, 4]",
            "--train.precision=bf16",
            "--model.table_rows.C1=77",
            '--model.table_rows."user.id"=78',
            "--train.max_steps=none",
        ],
    )
    assert (config.train.epochs, config.optimizer.dense.learning_rate) == (3, 1e-3)
    assert (config.data.path, config.model.over_arch_layer_sizes) == ("/elsewhere", (8, 4))
    assert (config.train.precision, config.model.table_rows, config.train.max_steps) == (
        "bf16",
        {"C1": 77, "user.id": 78},
        None,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.epoch=2", "there is no key train.epoch; did you mean train.epochs?"),
        ("--optimizer.dense.lerning_rate=1", "did you mean optimizer.dense.learning_rate?"),
        ("--trian.epochs=2", "there is no key trian; did you mean train?"),
        ("--train.epochs=0", "train.epochs = 0: Input should be greater than or equal to 1"),
        ("--train.precision=fp8", "train.precision = \"fp8\": Input should be 'fp32' or 'bf16'"),
        ("--model.embedding_dim=10", "model.embedding_dim = 10: Input should be a multiple of 4"),
        ("--model.dense_arch_layer_sizes=[8, 0]", "layer sizes must be positive"),
        ('--sharding.types=["table_wse"]', "Input should be 'data_parallel', 'table_wise'"),
        ("--name.x=1", "override '--name.x=1': name is a value, not a section"),
        ("train.epochs=2", "override 'train.epochs=2' is not of the form --section.key=value"),
        ("--train.epochs", "is not of the form --section.key=value"),
    ],
)
def test_a_wrong_override_names_key_value_and_fix(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(recipe, [override])
    assert message in str(error.value)


def test_a_missing_key_says_how_to_set_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "x"\n[data]\n')
    with pytest.raises(ConfigError, match=r"data.path is missing; set it in the recipe or with --data.path="):
        load_config(str(path))


def test_a_missing_recipe_lists_those_that_come_along():
    with pytest.raises(ConfigError, match=r"recipe nowhere does not exist; give a file's path or one of: .*quickstart"):
        load_config("nowhere")


def test_a_recipe_that_is_not_toml_says_so(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_config(str(path))


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load(name):
    assert load_config(name).name.replace("_", "-") == name.replace("_", "-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x = " + b"[" * 100_000, "is not TOML: values nested far too deep"),
        (b"x = " + b"1" * 5_000, "is not TOML: Exceeds the limit"),
        (b'name = "\xff"', r"is not UTF-8 text \(invalid start byte at byte 8\)"),
    ],
    ids=["deep", "digits", "bytes"],
)
def test_text_that_is_no_recipe_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "recipe.toml").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"recipe\.toml {message}"):
        load_config(str(tmp_path / "recipe.toml"))


def test_a_value_nested_far_too_deep_is_shown_cut(recipe):
    with pytest.raises(ConfigError, match=r"train\.epochs = \"\[{78}…: Input should be a valid integer"):
        load_config(recipe, ["--train.epochs=" + "[" * 100_000])


def test_tables_of_features_with_dots_are_modules_and_no_two_share_a_name():
    assert [table_name(name) for name in ("user", "user.id", "a/b c", "50%")] == [
        "t_user",
        "t_user%2Eid",
        "t_a/b c",
        "t_50%",
    ]
    letters = ["", "%", "2", "5", "E", "."]
    names = {"".join(parts) for parts in itertools.product(letters, repeat=5)}
    assert len({table_name(name) for name in names}) == len(names)
    assert not any("." in table_name(name) for name in names)
