"""`trl-core migrate`: every form of import, options, files and exit codes."""

import json
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from trl_core.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::trl_core.errors.TRLExperimentalWarning")


@pytest.fixture
def migrate(tmp_path, capsys):
    """Rewrite a source; returns the new one, the exit code and the findings as (line, name, kind)."""

    def run(source, name="script.py"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(source), encoding="utf-8")
        code = main(["migrate", "--write", "--json", str(file)])
        report = json.loads(capsys.readouterr().out)
        assert report["exit_code"] == code
        (found,) = report["files"]
        assert found["error"] is None
        assert all(finding["why"] and finding["instead"] for finding in found["findings"])
        listed = [(finding["line"], finding["name"], finding["kind"]) for finding in found["findings"]]
        new = file.read_text(encoding="utf-8")
        compile(new, name, "exec")
        assert main(["migrate", "--write", "--json", str(file)]) <= code
        again = json.loads(capsys.readouterr().out)
        assert not again["files"][0]["changed"], "a migrated file is left as it is"
        assert file.read_text(encoding="utf-8") == new
        return new, code, listed

    return run


# -- forms of import ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from trl import SFTTrainer\n", "from trl_core import SFTTrainer\n"),
        ("from trl import SFTTrainer as T, SFTConfig\n", "from trl_core import SFTTrainer as T, SFTConfig\n"),
        ("from trl.trainer.grpo_trainer import GRPOTrainer\n", "from trl_core import GRPOTrainer\n"),
        ("from trl.trainer import DPOTrainer, DPOConfig\n", "from trl_core import DPOTrainer, DPOConfig\n"),
        ("from trl.experimental.gfpo import GFPOConfig\n", "from trl_gfpo import GFPOConfig\n"),
        ("from trl.experimental.gspo_token import GRPOTrainer\n", "from trl_gspo import GRPOTrainer\n"),
        (
            "from trl import PPOv2Config, PPOv2Trainer as P\n",
            "from trl_ppo import PPOConfig as PPOv2Config, PPOTrainer as P\n",
        ),
        ("from trl import unpair_preference_dataset as maybe_unpair_preference_dataset\n",
         "from trl_core.data import maybe_unpair_preference_dataset\n"),
        ("import os; from trl import SFTConfig, BEMACallback; x = 1\n",
         "import os; from trl_core import SFTConfig; from trl_bema import BEMACallback; x = 1\n"),
        ("if True: from trl import SFTConfig, BEMACallback\n",
         "if True: from trl_core import SFTConfig; from trl_bema import BEMACallback\n"),
        ("import trl\nc = trl.SFTConfig()\n", "import trl_core\nc = trl_core.SFTConfig()\n"),
        ("import trl.trainer.sft_trainer\nt = trl.trainer.sft_trainer.SFTTrainer\n",
         "import trl_core\nt = trl_core.SFTTrainer\n"),
        ("import trl as t\nc = t.SFTConfig()\n", "import trl_core as t\nc = t.SFTConfig()\n"),
        ("import trl as t\nc = t.trainer.SFTConfig()\n", "import trl_core as t\nc = t.SFTConfig()\n"),
        ("import trl as t\nc, b = t.SFTConfig, t.BEMACallback\n",
         "import trl_bema\nimport trl_core\nc, b = trl_core.SFTConfig, trl_bema.BEMACallback\n"),
        ("import trl.experimental.gfpo as gfpo\nc = gfpo.GFPOConfig\n",
         "import trl_gfpo as gfpo\nc = gfpo.GFPOConfig\n"),
        ("import trl.experimental.gfpo\nc = trl.experimental.gfpo.GFPOConfig\n",
         "import trl_gfpo\nc = trl_gfpo.GFPOConfig\n"),
        ("from trl.experimental import gfpo\nc = gfpo.GFPOConfig\n", "import trl_gfpo as gfpo\nc = gfpo.GFPOConfig\n"),
        ("from trl.experimental import gfpo as g\nc = g.GFPOConfig\n", "import trl_gfpo as g\nc = g.GFPOConfig\n"),
        ("from trl import trainer, SFTConfig\nt = trainer.SFTTrainer\n",
         "from trl_core import SFTConfig\nimport trl_core as trainer\nt = trainer.SFTTrainer\n"),
        ("import os, trl, sys\nc = trl.SFTConfig\n", "import os, sys\nimport trl_core\nc = trl_core.SFTConfig\n"),
        ("import trl\n", "import trl_core\n"),
        ("import trl\ndef f(c: 'trl.SFTConfig') -> 'trl.DPOConfig | None': ...\n",
         "import trl_core\ndef f(c: 'trl_core.SFTConfig') -> 'trl_core.DPOConfig | None': ...\n"),
        ("from trl.core import LengthSampler, set_seed\n",
         "from trl_ppo.classic import LengthSampler\nfrom transformers import set_seed\n"),
    ],
)  # fmt: skip
def test_forms_of_import(migrate, before, after):
    assert migrate(before) == (after, 0, [])


def test_imports_at_any_depth(migrate):
    new, code, listed = migrate("""
        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from trl import GRPOTrainer
        try:
            from trl import BEMACallback, SFTTrainer
        except ImportError:
            BEMACallback = None


        def build():
            import trl

            return trl.GRPOConfig, trl.experimental.gfpo.GFPOConfig


        class Holder:
            from trl import DPOConfig
    """)
    assert (code, listed) == (0, [])
    assert "if TYPE_CHECKING:\n    from trl_core import GRPOTrainer\n" in new
    assert "try:\n    from trl_bema import BEMACallback\n    from trl_core import SFTTrainer\nexcept" in new
    assert "    import trl_core\n    import trl_gfpo\n\n    return trl_core.GRPOConfig, trl_gfpo.GFPOConfig\n" in new
    assert "class Holder:\n    from trl_core import DPOConfig\n" in new


def test_comments_and_brackets_stay_with_their_names(migrate):
    new, code, _ = migrate("""
        # above
        from trl import (
            # the callback
            BEMACallback,  # an average
            SFTTrainer,  # a trainer
            SFTConfig,
            # at the end
        )  # noqa: F401
    """)
    assert code == 0
    assert new == textwrap.dedent("""
        # above
        from trl_bema import (
            # the callback
            BEMACallback,  # an average
        )  # noqa: F401
        from trl_core import (
            SFTTrainer,  # a trainer
            SFTConfig,
            # at the end
        )  # noqa: F401
    """)


def test_layout_stays_where_all_names_move_together(migrate):
    new, _, _ = migrate("from trl import (\n  SFTTrainer, # x\n\n  SFTConfig)  # y\n")
    assert new == "from trl_core import (\n  SFTTrainer, # x\n\n  SFTConfig)  # y\n"


@pytest.mark.parametrize(
    "source",
    [
        "import trl_utils\nfrom trl_utils import GRPOTrainer\ntrl_utils.trl(1)\n",
        "from .trl import GRPOTrainer\nfrom . import trl\ntrl.GRPOTrainer()\n",
        "from transformers.utils import is_trl_available\nis_trl_available()\n",
        "trl = object()\ntrl.GRPOTrainer\n",
        "import my.trl\nmy.trl.GRPOTrainer\n",
        "def f(trl):\n    return trl.GRPOTrainer\n",
        "x = 'look into trl.py, trl.GRPOTrainer is there'\nlog = get_logger('trl.sub')\n",
        "",
    ],
)
def test_what_only_looks_alike_is_untouched(migrate, source):
    assert migrate(source) == (source, 0, [])


def test_a_local_name_hides_the_module(migrate):
    new, code, _ = migrate("import trl\ntrl.SFTConfig\ndef f(trl):\n    return trl.SFTConfig\n")
    assert (new, code) == ("import trl_core\ntrl_core.SFTConfig\ndef f(trl):\n    return trl.SFTConfig\n", 0)


# -- what cannot be mapped ---------------------------------------------------------------------------------------------
def test_unmapped_names_keep_their_import(migrate):
    new, code, listed = migrate("from trl import KTOTrainer, SFTConfig, Unheard as U\nKTOTrainer, SFTConfig, U\n")
    assert new.startswith("from trl_core import SFTConfig\nfrom trl import KTOTrainer, Unheard as U\n")
    assert (code, listed) == (1, [(1, "trl.KTOTrainer", "name"), (1, "trl.Unheard", "name")])


def test_unmapped_uses_keep_the_module(migrate):
    new, code, listed = migrate("import trl\na = trl.SFTConfig\nb = trl.KTOConfig\nc = vars(trl)\n")
    assert new == "import trl\nimport trl_core\na = trl_core.SFTConfig\nb = trl.KTOConfig\nc = vars(trl)\n"
    assert (code, listed) == (1, [(3, "trl.KTOConfig", "name"), (4, "trl", "name")])


def test_a_module_without_home_is_kept(migrate):
    source = "from trl.experimental import kto\nimport trl.experimental.nash_md\n"
    assert migrate(source) == (
        source,
        1,
        [(1, "trl.experimental.kto", "name"), (2, "trl.experimental.nash_md", "name")],
    )


def test_star_import_is_kept_and_listed(migrate):
    source = "from trl import *\nGRPOTrainer()\n"
    assert migrate(source) == (source, 1, [(1, "trl.*", "name")])


def test_strings_are_listed_and_not_rewritten(migrate):
    source = """
        import importlib
        from unittest import mock

        module = importlib.import_module("trl")
        mock.patch("trl.trainer.grpo_trainer.GRPOTrainer.train")
        mock.patch("trl.SFTTrainer")
        x = "trl"
    """
    new, code, listed = migrate(source)
    assert (new, code) == (textwrap.dedent(source), 1)
    assert [(line, kind) for line, _, kind in listed] == [(5, "text"), (6, "text"), (7, "text")]


def test_a_derived_class_is_noted(migrate):
    new, code, listed = migrate("from trl import GRPOTrainer\nclass Mine(GRPOTrainer):\n    pass\n")
    assert (code, listed) == (0, [(2, "trl.GRPOTrainer", "note")])
    assert new.startswith("from trl_core import GRPOTrainer\n")


# -- the two PPO trainers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("use", "home"),
    [
        ("t = PPOTrainer(c, model, ref, tok)\nt.step([q], [r], [s])", "trl_ppo.classic"),
        ("c = PPOConfig(ppo_epochs=4)", "trl_ppo.classic"),
        ("PPOTrainer(config=c, model=model, tokenizer=tok)", "trl_ppo.classic"),
        ("from trl.core import respond_to_batch", "trl_ppo.classic"),
        ("self.t = PPOTrainer(c, model)\nself.t.generate(q)", "trl_ppo.classic"),
        ("t = PPOTrainer(args=c, model=model)", "trl_ppo"),
        ("t = PPOTrainer(config=c, policy=p, reward_model=r, value_model=v)", "trl_ppo"),
        ("c = PPOConfig(num_ppo_epochs=4)", "trl_ppo"),
        ("t = PPOTrainer(**given)\nt.train()", "trl_ppo"),
    ],
)
def test_ppo_is_decided_from_its_use(migrate, use, home):
    new, _, _ = migrate(f"from trl import PPOConfig, PPOTrainer\n{use}\n")
    assert new.startswith(f"from {home} import PPOConfig, PPOTrainer\n")


@pytest.mark.parametrize("use", ["", "PPOTrainer(**given)", "PPOConfig(ppo_epochs=4, num_ppo_epochs=4)"])
def test_ppo_is_left_where_nothing_decides(migrate, use):
    source = f"from trl import PPOConfig, PPOTrainer\n{use}\n"
    new, code, listed = migrate(source)
    assert (new, code) == (source, 1)
    assert [name for _, name, _ in listed] == ["trl.PPOConfig", "trl.PPOTrainer"]


def test_experimental_ppo_is_the_later_one(migrate):
    new, code, _ = migrate("from trl.experimental.ppo import PPOTrainer\nPPOTrainer(**given)\n")
    assert (new.splitlines()[0], code) == ("from trl_ppo import PPOTrainer", 0)


# -- options -----------------------------------------------------------------------------------------------------------
def test_options_with_another_name_are_renamed(migrate):
    new, code, listed = migrate("""
        from trl import SFTConfig, SFTTrainer, PPOConfig, PPOTrainer, GRPOConfig
        SFTConfig("out", max_seq_length=3, evaluation_strategy="no", warmup_ratio=0.1)
        SFTTrainer(model, tokenizer=tok)
        PPOTrainer(config=c, policy=p, ref_policy=r, tokenizer=tok, value_model=v)
        GRPOConfig(vllm_importance_sampling_cap=2.0)
    """)
    assert (code, listed) == (0, [])
    assert 'SFTConfig("out", max_length=3, eval_strategy="no", warmup_steps=0.1)' in new
    assert "SFTTrainer(model, processing_class=tok)" in new
    assert "PPOTrainer(args=c, model=p, ref_model=r, processing_class=tok, value_model=v)" in new
    assert "GRPOConfig(vllm_importance_sampling_clip_max=2.0)" in new


def test_the_classic_trainer_keeps_its_tokenizer(migrate):
    new, code, _ = migrate("from trl import PPOTrainer\nPPOTrainer(config=c, model=m, tokenizer=t).step(1, 2, 3)\n")
    assert (code, "config=c, model=m, tokenizer=t" in new) == (0, True)


def test_a_name_that_is_given_already_is_not_given_twice(migrate):
    new, code, listed = migrate("from trl import SFTConfig\nSFTConfig(max_seq_length=3, max_length=4)\n")
    assert "max_seq_length=3, max_length=4" in new
    assert (code, listed) == (1, [(2, "SFTConfig(max_seq_length=...)", "option")])


def test_options_that_are_off_are_left_out(migrate):
    new, code, listed = migrate("""
        import trl
        args = trl.GRPOConfig(
            use_vllm=False,
            output_dir="out",  # here
            max_prompt_length=None,
        )
    """)
    assert new.endswith('args = trl_core.GRPOConfig(\n    output_dir="out",  # here\n)\n')
    assert (code, {kind for *_, kind in listed}) == (0, {"note"})


def test_options_that_are_not_here_are_listed(migrate):
    new, code, listed = migrate("""
        from trl import GRPOConfig, DPOTrainer
        c = GRPOConfig(
            output_dir="out",
            max_prompt_length=512,
            use_vllm=True,
            unheard_of=1,
        )
        DPOTrainer(m, beta=0.1, data_collator=d, **more)
    """)
    assert "max_prompt_length=512" in new
    assert code == 1
    assert listed == [
        (5, "GRPOConfig(max_prompt_length=...)", "option"),
        (6, "GRPOConfig(use_vllm=...)", "option"),
        (7, "GRPOConfig(unheard_of=...)", "option"),
        (9, "DPOTrainer(beta=...)", "option"),
        (9, "DPOTrainer(data_collator=...)", "option"),
    ]


def test_arguments_in_other_places_and_foreign_options_are_listed(migrate):
    _, code, listed = migrate("""
        from transformers import TrainingArguments
        from trl import SFTTrainer, GRPOTrainer
        args = TrainingArguments("out")
        SFTTrainer(model, args, collator, data)
        SFTTrainer(model, args=args)
        GRPOTrainer(model, reward, args, data)
    """)
    assert (code, listed) == (1, [(5, "SFTTrainer(...)", "option"), (6, "SFTTrainer(args=...)", "option")])


def test_arguments_of_functions_are_looked_at(migrate):
    source = "from trl import pack_dataset, BEMACallback\npack_dataset(d, 8, map_kwargs={})\nBEMACallback(3, lag=2)\n"
    _, code, listed = migrate(source)
    assert (code, listed) == (1, [(2, "pack_dataset(map_kwargs=...)", "option")])


def test_options_of_what_is_not_installed_are_not_looked_at(migrate, monkeypatch):
    monkeypatch.setattr("trl_core.migration.options.accepted", lambda home: None)
    new, code, listed = migrate("from trl import SFTConfig\nSFTConfig(max_seq_length=3)\n")
    assert (code, listed) == (0, [(2, "SFTConfig", "note")])
    assert new == "from trl_core import SFTConfig\nSFTConfig(max_seq_length=3)\n"


def test_the_same_option_of_another_class_is_untouched(migrate):
    source = "from trl import SFTConfig\nOther(max_seq_length=3, tokenizer=t)\n"
    assert migrate(source)[0] == source.replace("trl", "trl_core")


# -- files -------------------------------------------------------------------------------------------------------------
def test_a_dry_run_writes_nothing(tmp_path, capsys):
    file = tmp_path / "a.py"
    file.write_text("from trl import SFTConfig, KTOConfig\n")
    assert main(["migrate", str(file)]) == 1
    out = capsys.readouterr().out
    assert file.read_text() == "from trl import SFTConfig, KTOConfig\n"
    assert (
        "\n-from trl import SFTConfig, KTOConfig\n+from trl_core import SFTConfig\n+from trl import KTOConfig\n" in out
    )
    assert f"{file}:1: trl.KTOConfig: there is no KTO here." in out
    assert "pip install -e . in a checkout of trl-core (pip install trl-core once it is published)\n" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(("newline", "encoding"), [("\r\n", "utf-8"), ("\n", "utf-8-sig"), ("\r\n", "latin-1")])
def test_newlines_encoding_and_mode_are_kept(tmp_path, newline, encoding):
    file = tmp_path / "a.py"
    coding = "# -*- coding: latin-1 -*-\n" if encoding == "latin-1" else ""
    source = coding + "from trl import SFTConfig, BEMACallback\nname = 'é'\n"
    expected = coding + "from trl_core import SFTConfig\nfrom trl_bema import BEMACallback\nname = 'é'\n"
    file.write_bytes(source.replace("\n", newline).encode(encoding))
    file.chmod(0o751)
    assert main(["migrate", "--write", str(file)]) == 0
    assert file.read_bytes() == expected.replace("\n", newline).encode(encoding)
    assert stat.S_IMODE(file.stat().st_mode) == 0o751
    assert os.listdir(tmp_path) == ["a.py"]


def test_an_unchanged_file_is_not_touched(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("from trl import KTOConfig\n")
    os.utime(file, ns=(1, 1))
    assert main(["migrate", "--write", str(file)]) == 1
    assert file.stat().st_mtime_ns == 1


def test_a_link_leads_to_the_file_that_is_rewritten(tmp_path):
    (tmp_path / "real.py").write_text("import trl\n")
    (tmp_path / "link.py").symlink_to("real.py")
    assert main(["migrate", "--write", str(tmp_path / "link.py")]) == 0
    assert (tmp_path / "link.py").is_symlink()
    assert (tmp_path / "real.py").read_text() == "import trl_core\n"


def test_a_folder_without_hidden_ones_and_environments(tmp_path):
    for folder in ("", "sub", ".hidden", "env1", "site-packages"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.py").write_text("import trl\n")
    (tmp_path / "env1" / "pyvenv.cfg").touch()
    (tmp_path / "a.txt").write_text("import trl\n")
    assert main(["migrate", "--write", str(tmp_path), str(tmp_path / "a.py")]) == 0
    changed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if "trl_core" in _text(path)}
    assert changed == {"a.py", "sub/a.py"}


def _text(path):
    return path.read_text() if path.is_file() else ""


def test_broken_files_are_named_and_the_others_done(tmp_path, capsys):
    broken, bytes_, good = tmp_path / "broken.py", tmp_path / "bytes.py", tmp_path / "good.py"
    broken.write_text("import trl\n\ndef f(:\n")
    bytes_.write_bytes(b"import trl\nx = '\xff'\n")
    good.write_text("import trl\n")
    assert main(["migrate", "--write", str(tmp_path / "none.py"), str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{broken}:3: " in err
    assert f"{bytes_}: " in err
    assert f"{tmp_path / 'none.py'}: No such file" in err
    assert broken.read_text() == "import trl\n\ndef f(:\n"
    assert bytes_.read_bytes() == b"import trl\nx = '\xff'\n"
    assert good.read_text() == "import trl_core\n"


def test_a_file_that_cannot_be_written_is_named_and_whole(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.py"
    file.write_text("import trl\n")

    def refuse(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr("trl_core.migration.files.os.replace", refuse)
    assert main(["migrate", "--write", str(file)]) == 2
    assert "not written" in capsys.readouterr().err
    assert (os.listdir(tmp_path), file.read_text()) == (["a.py"], "import trl\n")


# -- notebooks ---------------------------------------------------------------------------------------------------------
def notebook(*cells):
    made = [
        {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        | ({"execution_count": None, "outputs": []} if kind == "code" else {})
        for kind, source in cells
    ]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def test_cells_of_a_notebook_are_one_script(tmp_path, capsys):
    file = tmp_path / "a.ipynb"
    cells = [
        ("code", "%pip install trl\nimport trl"),
        ("markdown", "We `import trl` here: é"),
        ("code", "%%bash\ntrl sft"),
        ("code", "c = trl.SFTConfig()\nk = trl.KTOConfig()\n"),
    ]
    file.write_text(notebook(*cells))
    assert main(["migrate", "--write", str(file)]) == 1
    expected = [
        ("code", "%pip install trl\nimport trl\nimport trl_core"),
        *cells[1:3],
        ("code", "c = trl_core.SFTConfig()\nk = trl.KTOConfig()\n"),
    ]
    assert file.read_text() == notebook(*expected)
    assert f"{file}:cell 4:2: trl.KTOConfig" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{'trl'", "no notebook"),
        (notebook(("code", "import trl\ndef f(:\n")), "cell 1, line 2"),
        (notebook(("code", "import trl\n")).replace('"cells":', '"cells"  :'), "unusual"),
    ],
)
def test_a_notebook_that_cannot_be_rewritten_says_so(tmp_path, capsys, text, said):
    file = tmp_path / "a.ipynb"
    file.write_text(text)
    assert main(["migrate", "--write", str(file)]) == 2
    assert said in capsys.readouterr().err
    assert file.read_text() == text


# -- output ------------------------------------------------------------------------------------------------------------
def shown(tmp_path, *arguments, **environment):
    """What the command prints on a terminal."""
    (tmp_path / "a.py").write_text("import trl\n")
    code = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'trl_core.cli.main', *sys.argv[1:]]) >> 8)"
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", code, "migrate", str(tmp_path / "a.py"), *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
        env=clean | {"TERM": "xterm-256color"} | environment,
    )
    assert "import trl_core" in done.stdout, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_colour_on_a_terminal_only(tmp_path):
    assert "\x1b[32m+import trl_core" in shown(tmp_path)
    assert "\x1b" not in shown(tmp_path, "--no-color")
    assert "\x1b" not in shown(tmp_path, NO_COLOR="1")


def test_json_says_what_to_install(tmp_path, capsys):
    (tmp_path / "a.py").write_text("from trl import SFTConfig, BEMACallback, set_seed\n")
    assert main(["migrate", "--json", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["install"] == ["trl-core", "trl-bema"]
    assert report["files"][0]["diff"][-1] == "+from transformers import set_seed"
    assert report["written"] is False


def test_without_libcst_the_mend_is_named(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("libcst", "trl_core.migration"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "libcst", None)
    assert main(["migrate", str(tmp_path)]) == 2
    assert "pip install 'trl-core[migrate]'" in capsys.readouterr().err


def test_pipes_and_links_in_a_circle_are_told(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "circle.py").symlink_to("circle.py")
    (tmp_path / "good.py").write_text("from trl import SFTTrainer\n")
    assert main(["migrate", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "pipe.py is no regular file" in err and "circle.py: Too many levels" in err
    assert "+from trl_core import SFTTrainer" in out
