import pytest

from trainer.config_file import ConfigError, load_config, shipped_recipes

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
            "--train.max_steps=none",
        ],
    )
    assert (config.train.epochs, config.optimizer.dense.learning_rate) == (3, 1e-3)
    assert (config.data.path, config.model.over_arch_layer_sizes) == ("/elsewhere", (8, 4))
    assert (config.train.precision, config.model.table_rows, config.train.max_steps) == ("bf16", {"C1": 77}, None)


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
def test_a_wrong_override_names_key_value_and_mend(recipe, override, message):
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
