"""What a run will need and how fast it may be, before it is launched: memory, traffic, time.

The trainer's own engine runs on fake tensors (`torch._subclasses.fake_tensor`) in a process group
of stand-ins: every buffer that ZeRO-3, autograd and the model allocate is seen, and none is made.
"""
