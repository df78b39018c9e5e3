"""What vLLM calls in each of its processes: the entry point of the group `vllm.general_plugins`.

Without `FATHOM_VLLM_ADAPTER_ROOT` nothing happens and nothing is imported, so that a vLLM which merely
has Fathom installed starts as it always did.
"""

from server.vllm import settings

RESOLVER_NAME = "Fathom"


def register() -> None:
    """Let vLLM ask for adapters and depths below the root. Raises ConfigError, which stops vLLM."""
    found = settings.load()
    if found is None:
        return
    # Here, since whoever names no root should not pay for it.
    from vllm.lora.resolver import LoRAResolverRegistry

    from server.vllm.resolver import DepthResolver

    if RESOLVER_NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(RESOLVER_NAME, DepthResolver(found))
