import pytest
import torch

from tokencache_kernels.demo.model import build_model, save_weights

for package in ("diffusers", "matplotlib", "mlxtend", "safetensors", "tqdm"):
    pytest.importorskip(package)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Weights of an untrained model whose blocks are not the identity that they are born as."""
    torch.manual_seed(0)
    model = build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_weights(model, path)
    return path
