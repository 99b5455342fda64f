"""Commands on open models: what the flags refuse, and that runs with their tokenizers go on elsewhere."""

import numpy as np
import pytest

from tests.support.gguf_models import write, write_small_smollm2
from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.config import ModelConfig, RunConfig
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.training.restore import LoadedModel, load_model

SHORT = [
    "--config.train.steps=2",
    "--config.train.batch_size=4",
    "--config.train.eval_batches=1",
    "--config.data.seq_len=16",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_smollm2(tmp_path_factory.mktemp("model") / "small.gguf")


def test_a_run_resumes_without_the_file_of_its_tokenizer(run, text, model, tmp_path):
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(model.read_bytes())
    flags = [f"--init_from={moved}", "--add_memory=pkm,engram", "--config.train.trainable=^(pkm|engram)"]
    memories = "--config.model.memories"
    sizes = [f"{memories}.pkm.address.num_keys=16", f"{memories}.engram.address.rows_per_head=(31,)"]
    train = ["train", *flags, *sizes, *text, *SHORT, f"--workdir={tmp_path / 'run'}"]
    status, _, err = run(*train, "--config.train.checkpoint_every=1", "--config.train.steps=1")
    assert status == 0, err
    before = load_model(tmp_path / "run")
    assert set(before.config.model.memories) == {"pkm", "engram"}
    assert before.config.data.tokenizer == str(moved) and before.tokenizer.vocab_size > 256
    # The file is needed for its config, and may lie elsewhere.
    elsewhere = [word.replace(str(moved), str(model)) for word in train]
    moved.unlink()
    status, _, err = run(*elsewhere)
    assert status == 0 and "resumed from step 1" in err, err
    after = load_model(tmp_path / "run")
    assert after.step == 2
    layer = before.variables["params"]["layer_1"]["attention"]["w_query"]
    assert np.array_equal(after.variables["params"]["layer_1"]["attention"]["w_query"], layer)
    _, given = open_models.load(model)
    assert np.array_equal(given["params"]["layer_1"]["attention"]["w_query"], layer)


def test_an_exported_model_of_bytes_is_a_model(run, text, tmp_path):
    tiny = ["--preset=dense-tiny", "--config.model.embed_dim=16", "--config.model.num_layers=1"]
    tiny.append("--config.model.mlp_dim=16")
    status, _, err = run("train", *tiny, *text, *SHORT, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    status, out, err = run("export", f"--workdir={tmp_path / 'run'}", f"--folder={tmp_path / 'out'}")
    assert status == 0 and "ultramem_jax, tokens are bytes" in out, err
    flags = ["--prompt=the slot", "--temperature=0", "--num_tokens=5"]
    _, of_run, _ = run("generate", f"--workdir={tmp_path / 'run'}", *flags)
    status, of_export, err = run("generate", f"--model={tmp_path / 'out'}", *flags)
    assert status == 0 and of_export == of_run, err


REFUSED = {
    "no such model": (["train", "--init_from=nowhere"], "model = 'nowhere': must be a folder or a .gguf"),
    "unknown memory": (["train", "--add_memory=ultramen"], "unknown memory to add 'ultramen': did you mean"),
    "a memory that is there": (["train", "--add_memory=ultramem"], "must name memories that the model does"),
    "no model to generate with": (["generate", "--model=nowhere"], "nowhere: no such file"),
    "a run and a model": (
        ["generate", "--model=x", "--workdir=y"],
        "--workdir = 'y': must not be given with",
    ),
    "a dtype of a run": (["generate", "--dtype=bfloat16"], "--dtype = 'bfloat16': needs --model"),
    "a context for a run": (["evaluate", "--seq_len=64"], "--seq_len = 64: needs --model"),
    "no folder": (["export", "--workdir=x"], "--folder"),
    "no run to export": (["export", "--workdir=nowhere", "--folder=new"], "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_one_line(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, said = REFUSED[case]
    status, out, err = run(*words)
    assert status == 2 and said in err and not out, err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_does_not_fit_its_tokenizer(run, text, tmp_path):
    from tests.support import gguf_models as made

    words = made.tokenizer_fields(made.byte_level(made.PRE_TOKENIZERS["smollm"]), "smollm")
    state = made.state_of("llama", tied=True)  # 40 words
    path = write(tmp_path / "odd.gguf", made.tensors_of("llama", state), made.fields_of("llama"), other=words)
    status, _, err = run("generate", f"--model={path}")
    assert status == 2 and "model.vocab_size = 40: must be at least the 37" in err, err
    assert "ids of the tokenizer of --model" in err
    status, _, err = run("train", f"--init_from={path}", *text, *SHORT, f"--workdir={tmp_path / 'run'}")
    assert status == 2 and "model.vocab_size = 40: must be at least" in err, err
    assert not (tmp_path / "run").exists()


def test_a_context_is_at_most_what_the_model_reads():
    config = ModelConfig(max_length=4096)
    an_open_one = GivenModel(config, {}, ByteTokenizer(), 1024, "open", None)
    assert [an_open_one.length(asked) for asked in (None, 8, 4096)] == [1024, 8, 4096]
    with pytest.raises(UserError, match="--seq_len = 4097: must be at most 4096, what the model reads"):
        an_open_one.length(4097)
    without_limit = an_open_one._replace(config=ModelConfig())
    assert without_limit.length(8192) == 8192
    trained = LoadedModel(RunConfig(config), {}, ByteTokenizer(), step=1, corpus={})
    of_run = an_open_one._replace(run=trained)
    assert [of_run.length(asked) for asked in (None, 1024)] == [1024, 1024]
    with pytest.raises(UserError, match="--seq_len = 1025: must be at most 1024"):
        of_run.length(1025)
