"""Says no to checkpoints whose weights are quantized."""


def describe_quantization(config) -> str | None:
    """Return a config's quantization format in words, such as ``"gptq, 4 bits"``, or None.

    Args:
        config: A transformers config; one with parts (text, vision) may say it in the text part.
    """
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization is not None:
            break
    else:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    bits = quantization.get("bits") or quantization.get("w_bit")
    for size in (4, 8):  # bitsandbytes, which older checkpoints do not name
        if quantization.get(f"load_in_{size}bit"):
            bits = size
            quantization = {"quant_method": "bitsandbytes"} | quantization
    method = quantization.get("quant_method") or "an unnamed format"
    words = [str(getattr(method, "value", method))]
    if quantization.get("format"):
        words.append(str(quantization["format"]))
    if bits:
        words.append(f"{bits} bits")
    return ", ".join(words)


def refuse_quantized(config, bf16_bytes: int) -> None:
    """Refuse a quantized checkpoint.

    Args:
        config: Its transformers config.
        bf16_bytes: What all of the model's weights take in bfloat16.

    Raises:
        ValueError: The config has a ``quantization_config``; names the format and the size.
    """
    found = describe_quantization(config)
    if found is not None:
        raise ValueError(
            f"the checkpoint is quantized ({found}), which is not supported: use the model's "
            f"bfloat16 checkpoint, whose weights take {bf16_bytes:,} bytes "
            f"({bf16_bytes / 2**30:.1f} GiB)"
        )
