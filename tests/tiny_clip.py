"""A tiny CLIP as transformers writes it: for tests."""

from pathlib import Path


def write_clip(folder: Path, projection: int = 20):
    """Write a CLIPModel with every parameter random. Returns: it, its processor, its tokenizer."""
    import torch
    from families import clip_tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    tokenizer = clip_tokenizer("<|endoftext|>")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        eos_token_id=2,
        projection_dim=projection,
        hidden_act="gelu",
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
        projection_dim=projection,
        hidden_act="gelu",
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
        model.logit_scale.fill_(3.0)
    processor = CLIPImageProcessorPil(size=24, crop_size=24)
    for part in (model.eval(), processor, tokenizer):
        part.save_pretrained(folder)
    return model, processor, tokenizer
