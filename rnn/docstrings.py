"""The docstrings of layers and cells: torch.nn's text, with its shapes and formulas, and ours."""

_LAYER = """

    Beside the arguments of torch.nn's layer:
        plan: a `rnn.kernels.plan.Plan`, how to compute the layer; chosen for each call if None.
        recompute: keep no activations for the backward pass but the states, and compute the others
            once more there.
        checkpoint: keep for the backward pass only the states of about every so many steps (True:
            sqrt(T)), and compute the others once more there; in the C++ of the CPU at least one of
            its windows lies between. Without effect while compiling or exporting, under transforms,
            and where torch's operations compute the layer.

    Parameters, their names, shapes and initial values are torch.nn's, and so are the formulas
    above. Tensors are float16, bfloat16, float32 or float64, all of one dtype unless autocast is
    on. `forward` takes `lengths`, `resets` and `return_states` as well.

    Source: {source}.

    Raises TypeError for a plan, recompute or checkpoint of another kind, ValueError for a plan that
    there is not or a checkpoint below 1, and both for the other arguments as torch.nn's layer does.
    """
_CELL = """

    One step, computed by torch.nn's own code. Shapes, parameters and formulas are those above;
    tensors are float16, bfloat16, float32 or float64, all of one dtype unless autocast is on.

    Source: {source}.

    Raises TypeError and ValueError for arguments that torch.nn's cell refuses, as it does.
    """
_SOURCES = {
    "RNN": """Elman, Finding Structure in Time, 1990,
    https://doi.org/10.1207/s15516709cog1402_1""",
    "LSTM": """Hochreiter and Schmidhuber, Long Short-Term Memory, 1997,
    https://doi.org/10.1162/neco.1997.9.8.1735; the forget gate, Gers, Schmidhuber and Cummins,
    Learning to Forget, 2000, https://doi.org/10.1162/089976600300015015; the projection, Sak,
    Senior and Beaufays, 2014, https://arxiv.org/abs/1402.1128""",
    "GRU": """Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014,
    https://arxiv.org/abs/1406.1078v1, with the reset gate after the product, as in torch.nn""",
}


def layer_doc(theirs: type) -> str:
    """Of our layer in place of that class of torch.nn."""
    return f"{theirs.__doc__}{_LAYER.format(source=_SOURCES[theirs.__name__])}"


def cell_doc(theirs: type) -> str:
    """Of our cell in place of that class of torch.nn."""
    name = theirs.__name__.removesuffix("Cell")
    return f"{theirs.__doc__}{_CELL.format(source=_SOURCES[name])}"
