"""Configs and flags: one config is the whole run, and what is wrong is told in one line."""

import json

import pytest

from command import call, refused
from experiments import ablate, build, cli, compare, evaluate, robustness, settings, train
from experiments.configs import common
from mmjax import meta, models, types

DATASETS = ("mosi", "mosei", "sims", "sims_v2", "iemocap")


@pytest.mark.parametrize("name", settings.names())
def test_every_config_is_a_run_and_survives_json(name):
  for dataset in DATASETS:
    config = settings.load(name, dataset)
    settings.check(config)
    build.make_system(config)
    build.make_method(config)
    again = settings.from_json(json.loads(json.dumps(settings.plain(config))))
    assert settings.plain(again) == settings.plain(config)
    assert config.data.name == dataset
    assert (config.data.task == "classification") is (dataset in common.CLASSIFICATION)


@pytest.mark.parametrize("name", settings.names())
def test_a_config_holds_only_what_differs_from_the_model(name):
  config = settings.load(name, "mosi")
  defaults = models.settings(config.model.name)
  same = {k for k, v in settings.plain(config.model).items() if k != "name" and defaults[k] == v}
  # what the papers' tables give by dataset; the discriminators' rate follows the optimizer's
  by_dataset = {"heads", "margin", "teacher_epochs"}
  assert (
    same <= {"mi_share", "fusion_depth", "adversarial_weight", "discriminator_rate"} | by_dataset
  )


def test_a_dataset_without_settings_is_said_aloud(capsys):
  assert settings.load("misa:sims_v2").model.hidden_size == 64
  assert capsys.readouterr().err == ""
  assert "hidden_size" not in settings.load("misa:sims_v3").model
  assert "config misa has no settings of its own for 'sims_v3'; MOSI's" in capsys.readouterr().err
  table = {"mosi": 1, "sims": 2}
  assert common.settings_for("almt", "sims_v2", table, sims_v2="sims") == 2
  assert "SIMS's are used" in capsys.readouterr().err


def test_changing_an_entry():
  config = settings.load("mmim:mosi")
  for text in (
    "train.epochs=3",
    "model.lstm_sizes=4,8",
    "model.bert.folder=123",
    "mask.rate=0.5",
    "mask.drop=text",
    "data.stream=true",
    "optimizer.learning_rate=1",
    "phase_optimizer.main.weight_decay=0",
    "method.optimizer.momentum=0.5",
    "method.inner_steps=2",
  ):
    settings.assign(config, *settings.parse(text))
  assert config.train.epochs == 3
  assert config.model.lstm_sizes == (4, 8)
  assert config.model.bert.folder == "123"
  assert config.mask.rate == 0.5 and config.mask.drop == ("text",)
  assert config.data.stream is True
  assert isinstance(config.optimizer.learning_rate, float)
  assert config.phase_optimizer.main.weight_decay == 0
  assert config.method.optimizer.momentum == 0.5
  build.make_method(config)


def test_a_rate_that_follows_the_epochs_follows_a_flag():
  config = settings.load("almt:mosi")
  settings.assign(config, "train.epochs", "7")
  assert settings.plain(config)["optimizer"]["learning_rate"]["epochs"] == 7


@pytest.mark.parametrize(
  "text, told",
  [
    ("train.epoch=3", "did you mean 'epochs'"),
    ("trian.epochs=3", "did you mean 'train'"),
    ("model.hiden_size=3", "did you mean 'hidden_size'"),
    ("method.inner_step=3", "did you mean 'inner_steps'"),
    ("optimizer.learning_rat=3", "did you mean 'learning_rate'"),
    ("mask.complete_share=0.5", "config.mask of 'span' has"),
    ("mask.name=spam", "did you mean 'span'"),
    ("train.epochs=3.5", "expected a whole number"),
    ("train.epochs=three", "expected a whole number"),
    ("data.stream=perhaps", "expected true or false"),
    ("optimizer.learning_rate=fast", "expected a number"),
    ("seed", "expected ENTRY=VALUE"),
  ],
)
def test_what_no_config_takes(text, told):
  config = settings.load("misa:mosi")
  before = settings.plain(config)
  with pytest.raises(types.UsageError, match=told):
    settings.assign(config, *settings.parse(text))
  assert settings.plain(config) == before


def test_switching_keeps_what_the_other_takes_too():
  config = settings.load("lnln:mosi")
  assert config.mask.complete_share == 0.5
  settings.switch(config, "mask", "span")
  assert settings.plain(config.mask) == {"name": "span", "rate": (0.4, 0.6), "drop": ()}
  settings.switch(config, "method", "spl")
  assert settings.plain(config.method) == {"name": "spl"}
  settings.switch(config, "method", "m3s")
  assert build.title(config) == "M3S"
  for name in meta.METHODS:
    settings.switch(config, "method", name)
    assert build.make_method(config).draws == (2 if name == "m3s" else 1)


def test_short_forms_and_entries_must_agree():
  short = {"method.name": "spl", "seed": 3, "mask.rate": (0.2, 0.4)}
  config = cli.change(settings.load("misa:mosi"), short, {"method.name": "spl", "seed": "3"})
  assert (config.method.name, config.seed, config.mask.rate) == ("spl", 3, (0.2, 0.4))
  with pytest.raises(types.UsageError, match="'spl' by its own flag and 'm3s' by"):
    cli.change(settings.load("misa:mosi"), short, {"method.name": "m3s"})


def test_lists_of_seeds_and_rates():
  assert cli.seeds("seeds", "5") == [0, 1, 2, 3, 4]
  assert cli.seeds("seeds", "1111,1112") == [1111, 1112]
  assert cli.seeds("seeds", "1111,") == [1111]
  assert cli.rate("r", "0.4,0.6") == (0.4, 0.6) and cli.rate("r", "0.5") == (0.5, 0.5)
  assert cli.rate("r", None) is None
  for wrong in ("abc", "0", "-1", "1,1", "1,b", ",", ""):
    with pytest.raises(types.UsageError, match="--seeds"):
      cli.seeds("seeds", wrong)
  for wrong in ("abc", "0.4,1.6", "0.6,0.4", "0.1,0.2,0.3", "", "nan"):
    with pytest.raises(types.UsageError, match="--r="):
      cli.rate("r", wrong)


TRAIN = ("train", "--config=misa:mosi", "--workdir=nowhere/run")
COMPARE = ("compare", "--config", "misa:mosi", "--out=nowhere/out")
ROBUST = ("robustness", "--configs=misa", "--out=nowhere/out")
ABLATE = ("ablate", "--model=misa", "--out=nowhere/out")


@pytest.mark.parametrize(
  "command, told",
  [
    ((*TRAIN, "--config.train.epoch=3"), "did you mean 'epochs'"),
    ((*TRAIN, "--set=train.epoch=3"), "did you mean 'epochs'"),
    ((*TRAIN, "--config.train.batch_size=-4"), "config.train.batch_size=-4: expected at least 1"),
    ((*TRAIN, "--missing_rate=abc"), "--missing_rate=abc: expected a rate or LOW,HIGH"),
    ((*TRAIN, "--missing_rate=0.4,1.6"), "--missing_rate=0.4,1.6: expected 0 <= LOW"),
    ((*TRAIN, "--config.mask.rate=0.4,1.6"), "config.mask.rate"),
    ((*TRAIN, "--method=m4s"), "did you mean 'm3s'"),
    ((*TRAIN, "--seed=abc"), "--seed=abc"),
    ((*TRAIN, "--sed=3"), "did you mean 'seed'"),
    ((*TRAIN, "loose"), "unexpected arguments: loose"),
    (("train", "--config=misa:mosi"), "--workdir is missing"),
    (("train", "--workdir=nowhere/run"), "--config is missing"),
    (("train", "--workdir=nowhere/run", "--config=mias:mosi"), "did you mean 'misa'"),
    (("train", "--workdir=nowhere/run", "--config=experiments/configs/miza.py"), "'misa'"),
    (("evaluate", "--workdir=nowhere/run"), "holds no training run"),
    (("evaluate", "--workdir=nowhere/run", "--mask_seeds=x"), "--mask_seeds=x"),
    ((*COMPARE, "--methods=orig,maml"), "--methods: unknown method 'maml'"),
    ((*COMPARE, "--seeds=abc"), "--seeds=abc"),
    ((*COMPARE, "--test_rate=2"), "--test_rate=2"),
    ((*COMPARE, "--set=train.epoch=3"), "did you mean 'epochs'"),
    ((*COMPARE, "--methods=orig,spl", "--config.method.inner_steps=3"), "none of orig, spl takes"),
    ((*COMPARE, "--processes=0"), "--processes=0"),
    ((*COMPARE, "--schedule=now"), "--schedule=now"),
    ((*ROBUST, "--set=train.epoch=3"), "did you mean 'epochs'"),
    ((*ROBUST, "--config.train.epoch=3"), "did you mean 'epochs'"),
    ((*ROBUST, "--set=mias/train.epochs=3"), "'mias' (did you mean 'misa'?) is none of misa"),
    ((*ROBUST, "--conditions=rates,moods"), "unknown 'moods'"),
    ((*ROBUST, "--mask=spam"), "did you mean 'span'"),
    ((*ROBUST, "--seeds="), "--seeds="),
    (("robustness", "--configs=mias", "--out=nowhere/out"), "did you mean 'misa'"),
    ((*ABLATE,), "nothing to change"),
    ((*ABLATE, "--ablation=modality"), "did you mean 'modalities'"),
    ((*ABLATE, "--change=deaf"), "expected NAME: ENTRY=VALUE"),
    ((*ABLATE, "--change=deaf: mask.dorp=audio"), "misa deaf: there is no entry config.mask.dorp"),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, told, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert told in refused(*command)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("binary", [train, evaluate, compare, robustness, ablate])
def test_help_shows_every_flag(binary):
  name = binary.__name__.rpartition(".")[2]
  code, text = call(name, "--help")
  assert code == 0
  for flag in binary._FLAGS:
    assert f"--{flag}: " in text
  assert (name == "evaluate") or "--config.train.epochs=" in text
