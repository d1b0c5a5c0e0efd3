import torch

from tokencache_kernels import backends
from tokencache_kernels.backends import library
from tokencache_kernels.commands import info
from tokencache_kernels.commands.cli import main


def test_info_tells_versions_settings_and_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("TOKENCACHE_BACKEND", "reference")

    assert main(["info"]) == 0

    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "TOKENCACHE_BACKEND           reference" in printed
    for device in info.DEVICES:
        assert f"Backends on {device}" in printed
    for backend in ("triton", "native", "reference"):
        assert printed.count(f"\n  {backend}: runs ") == 2
    assert "Attention on cpu, under auto" in printed


def test_a_backend_that_cannot_run_says_why():
    # no kernel of ours runs there
    device = torch.device("meta")

    lines = info.describe_backends(device)

    reason = backends.unavailable("triton", "gather_rows", device, torch.float32)
    assert f"triton: runs 0 of {len(info.OPS)} ops" in lines
    assert f"  not all: {reason}" in lines
    assert f"reference: runs {len(info.OPS)} of {len(info.OPS)} ops" in lines
    assert lines[-1] == "auto: takes reference"


def test_an_op_that_a_backend_lacks_is_named_and_the_others_counted(monkeypatch):
    def unavailable(name, op, device, dtype):
        return f"it has no {op}" if (name, op) == ("triton", "gather_rows") else None

    monkeypatch.setattr(info.backends, "unavailable", unavailable)
    monkeypatch.setattr(info, "chosen_backend", lambda op, device: "triton")

    lines = info.describe_backends(torch.device("cpu"))

    assert lines[0] == f"triton: runs {len(info.OPS) - 1} of {len(info.OPS)} ops"
    assert lines[1] == "  not gather_rows: it has no such op"
    assert lines[-1] == "auto: takes triton"


def test_a_backend_of_one_op_names_it():
    lines = info.describe_backends(torch.device("cpu"))

    assert f"library: runs 1 of {len(info.OPS)} ops" in lines
    assert "  none but attention: it has no such op" in lines


def test_the_attention_chosen_is_named_with_what_the_table_prefers_to_it(monkeypatch):
    device = torch.device("cpu")
    row = library.Row("cpu", ["float32", "bfloat16"], 72, ["cudnn", "cpu_flash"], "this test")
    monkeypatch.setattr(library, "read_table", lambda: (row,))

    lines = info.describe_attentions(device)

    assert lines[:2] == [
        "DiT-XL, 256 px, float32: cpu_flash (this test)",
        "  not cudnn: it needs a CUDA device, got cpu",
    ]
    # its heads are wider than any row is for
    assert "FLUX, 1024 px, fresh, bfloat16: reference (no row of the table)" in lines


def test_the_backend_chosen_is_the_one_asked_for(monkeypatch):
    monkeypatch.setenv("TOKENCACHE_BACKEND", "reference")

    assert info.chosen_backend("mlp_", torch.device("cpu")) == "reference"


def test_a_measurement_carries_its_machine():
    facts = info.machine_facts(torch.device("cpu"))

    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert "cores" in facts["device"]
