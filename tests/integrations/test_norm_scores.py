"""Scores by the norms of keys and values, against projections that are seen by plain hooks."""

import pytest
import torch

from tokencache_kernels.integrations.diffusers import apply_token_cache, inspect_token_cache
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    ScoreSelector,
    Site,
    ToCaConfig,
)
from tokencache_kernels.testing.families import FAMILIES

# diffusers deprecates parts of its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# projections or norms whose outputs the attention sees, but for a rotation; of text, then image
SEEN = {
    ("DiTTransformer2DModel", "key_norm"): ("main", 3, ("attn1.to_k",)),
    ("DiTTransformer2DModel", "value_norm"): ("main", 3, ("attn1.to_v",)),
    ("FluxTransformer2DModel", "key_norm"): ("double", 2, ("attn.norm_added_k", "attn.norm_k")),
    ("FluxTransformer2DModel", "value_norm"): ("double", 2, ("attn.add_v_proj", "attn.to_v")),
}


@pytest.mark.parametrize("takes_largest", [False, True])
@pytest.mark.parametrize(("name", "base_score"), SEEN)
def test_tokens_are_selected_by_the_norms_that_the_attention_sees(name, base_score, takes_largest):
    stream, heads, paths = SEEN[name, base_score]
    model = FAMILIES[name].build()
    selector = ScoreSelector(base_score, takes_largest=takes_largest)
    router = FactorRouter(0.3, module_weight={"attn": 0.0})
    apply_token_cache(model, ToCaConfig(IntervalSchedule(2), router, selector, 4))
    block, seen = model.transformer_blocks[1], {}
    for path in paths:

        def look(module, inputs, output, path=path):
            seen[path] = output.reshape(*output.shape[:2], heads, -1)

        block.get_submodule(path).register_forward_hook(look)

    with torch.no_grad():
        model(**FAMILIES[name].inputs(0, 0, 2), return_dict=False)
        # of the image, which comes last
        norms = seen[paths[-1]].norm(dim=-1).mean(dim=-1)
        model(**FAMILIES[name].inputs(1, 0, 2), return_dict=False)

    (run,) = inspect_token_cache(model)
    site = run.sites[Site(stream, 1, "mlp")]
    torch.testing.assert_close(site.scores, 1 - norms, rtol=1e-5, atol=1e-5)
    count = int(site.is_fresh[0].sum())
    wanted = norms.topk(count, largest=takes_largest).indices.sort().values
    assert 0 < count < norms.shape[1]
    assert all(site.indices(sample).equal(wanted[sample]) for sample in range(2))


def test_scores_that_are_no_norms_have_one_direction():
    with pytest.raises(ValueError, match="takes_largest must be False for a score that is no norm"):
        ScoreSelector("attention_received", takes_largest=True)
