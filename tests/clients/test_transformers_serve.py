"""`transformers serve` loads no model whose code is not its own; when it does, this test says so."""

import pytest


manager = pytest.importorskip("transformers.cli.serving.model_manager")


@pytest.mark.filterwarnings("ignore")
def test_it_looks_for_a_models_class_in_transformers_alone(make_folder):
    with pytest.raises(AttributeError, match="module transformers has no attribute CharformerForCausalLM"):
        manager.ModelManager(trust_remote_code=True).load_model_and_processor(f"{make_folder()}@main")
