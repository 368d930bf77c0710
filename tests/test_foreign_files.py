"""Files that others made: code in them is not run, and nothing in them is misread in silence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kloss.cl.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["go home", "stop it now", "play a song"] * 9, folder, vocab_size=60)
    return folder


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


EVIL = """open({path!r}, "w")
from transformers import PreTrainedTokenizerFast, PretrainedConfig
class E(PreTrainedTokenizerFast): pass
class C(PretrainedConfig): model_type = "evil"
"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer_folder_is_not_run_though_stdin_says_yes(tokenizer, tmp_path, file):
    folder = tmp_path / "t"
    folder.mkdir()
    for source in tokenizer.iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "evil.py").write_text(EVIL.format(path=str(tmp_path / "owned")))
    if file == "config.json":
        (folder / "tokenizer_config.json").unlink()
        edit(folder / file, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoTokenizer": ["evil.E", "evil.E"]})
    else:
        edit(folder / file, tokenizer_class="E", auto_map={"AutoTokenizer": ["evil.E", "evil.E"]})
    program = "import sys; from kloss.cl.tokenizer import load_tokenizer as f; f(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, folder], input="y\n" * 9, capture_output=True, text=True, cwd=ROOT)
    assert not (tmp_path / "owned").exists()
    if file == "tokenizer_config.json":
        assert "UserError: cannot load a tokenizer" in done.stderr.splitlines()[-1]
    else:  # transformers leaves the code aside and reads tokenizer.json
        assert done.returncode == 0, done.stderr
