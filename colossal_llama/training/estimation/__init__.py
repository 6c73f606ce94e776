"""What a run will need, from its flags and the model's configuration alone.

``rank_model`` says what one process holds of the model, ``traced_pass`` what a pass over it keeps,
``sharing`` and ``gemini`` what the plugins make of weights, gradients and optimizer, ``peak`` when
it is the most, ``checkpoint_size`` what goes to disk, and ``report`` says it to the user.
"""
