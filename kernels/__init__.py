"""The fused token-adaptive projector: public op and reference."""
