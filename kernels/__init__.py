"""The recurrence itself, without modules or autograd. Imported as `rnn.kernels`. T time steps, B
batch (sequences), I input size, H hidden units, G gates, S states carried (state 0 is h, the one
that W_hh multiplies), A activations saved for the adjoint, N recurrences run side by side
(directions), R rows: one step of one sequence. x: input pre-activations W_ih x_t + b_ih; r:
recurrent ones W_hh h_{t-1} + b_hh. In kernels: BB, BN and BK are the sizes of a program's tile in
B, H and the product; o_ offsets, m_ masks."""

from . import forks as forks
