import importlib
import subprocess
import sys

import pytest

from tokencache_kernels import __name__ as package
from tokencache_kernels.commands import cli, info
from tokencache_kernels.version import __version__


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_subcommand_is_a_module_with_two_functions(command):
    module = importlib.import_module(f"{package}.{cli.COMMANDS[command][0]}")

    assert callable(module.add_arguments)
    assert callable(module.run)


def test_help_names_every_subcommand_and_imports_none():
    program = (
        "import sys\n"
        "from tokencache_kernels.commands.cli import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    assert not {'torch', 'triton', 'diffusers'} & set(sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert f"    {command} " in done.stdout or f"    {command}\n" in done.stdout


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])

    assert capsys.readouterr().out == f"tokencache_kernels {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_without_a_known_subcommand_the_usage_is_shown(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)

    assert "usage: tokencache" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    def run(_):
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")

    monkeypatch.setattr(info, "run", run)

    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == (
        "tokencache info: it needs mlxtend, which is not installed\n"
    )


def test_models_are_listed_with_their_tiers(capsys):
    assert cli.main(["models"]) == 0

    out = capsys.readouterr().out
    assert "WanTransformer3DModel\n  blocks: attn1, attn2, ffn; fused" in out
    assert "layers: attention, feed_forward; fused" in out
    assert "transformer_blocks: attn1, ff; as is: the norm before attn1 is not described" in out
    assert "SanaTransformer2DModel: not supported" in out
