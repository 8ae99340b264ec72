"""Reinforcement learning with a memory: a recurrent policy finds the way in a T-maze.

At the start a light says left or right; then comes a corridor of a length drawn anew for each
episode, where nothing tells it; at its end is the junction (Bakker, Reinforcement Learning with
Long Short-Term Memory, 2001). Advantage actor-critic (Mnih et al., 2016) over windows in which many
episodes end and begin: `resets=` makes the state zero there, in one call for the whole window.

The same network without a memory, the baseline, is the one whose state is reset before every
step."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import training

OBSERVATIONS = 4  # light left, light right, corridor, junction
FORWARD, LEFT, RIGHT = ACTIONS = range(3)
PATIENCE = 2  # steps for each field of the corridor, until an episode is given up
DISCOUNT = 0.97


class TMaze:
    """`count` mazes side by side, in NumPy; one whose episode ends begins the next."""

    def __init__(self, count: int, corridor: int, seed: int) -> None:
        self.corridor = corridor
        self.drawn = np.random.default_rng(seed)
        self.length = np.ones(count, dtype=int)
        self.place = np.zeros(count, dtype=int)
        self.time = np.zeros(count, dtype=int)
        self.goal = np.zeros(count, dtype=int)
        self.begin(np.ones(count, dtype=bool))

    def begin(self, which: np.ndarray) -> None:
        count = int(which.sum())
        self.length[which] = self.drawn.integers(self.corridor // 2, self.corridor + 1, count)
        self.goal[which] = self.drawn.choice([LEFT, RIGHT], count)
        self.place[which] = 0
        self.time[which] = 0

    def observe(self) -> np.ndarray:
        """float32 [count, OBSERVATIONS]."""
        seen = np.zeros((len(self.place), OBSERVATIONS), dtype=np.float32)
        at_start = self.place == 0
        seen[:, 0] = at_start & (self.goal == LEFT)
        seen[:, 1] = at_start & (self.goal == RIGHT)
        seen[:, 2] = self.place < self.length
        seen[:, 3] = self.place == self.length
        return seen

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, whether the episode has ended, and whether at its goal: [count] each."""
        at_end = self.place == self.length
        turned = actions != FORWARD
        won = at_end & (actions == self.goal)
        self.time += 1
        ended = (at_end & turned) | (self.time >= PATIENCE * (self.length + 1))
        # To turn in the corridor or to walk into the wall costs a little
        reward = np.where(won, 1.0, np.where(at_end == turned, 0.0, -0.05))
        self.place += ~at_end & ~turned
        self.begin(ended)
        return reward.astype(np.float32), ended, won


class Policy(nn.Module):
    """Scores of the actions and the value of the state, of each step."""

    def __init__(self, layer: Callable[..., Any], hidden: int, memory: bool) -> None:
        super().__init__()
        self.rnn = layer(OBSERVATIONS, hidden)
        self.actor = nn.Linear(hidden, len(ACTIONS))
        self.critic = nn.Linear(hidden, 1)
        self.memory = memory

    def forward(self, seen: Tensor, state: Any, resets: Tensor) -> tuple[Tensor, Tensor, Any]:
        """seen [T, B, OBSERVATIONS], resets [T, B]: where an episode begins -> scores [T, B,
        actions], values [T, B], and the last state."""
        if not self.memory:
            resets = torch.ones_like(resets)
        if isinstance(self.rnn, training.PackingLayer):
            h, state = loop_with_resets(self.rnn, seen, state, resets)
        else:
            h, state = self.rnn(seen, state, resets=resets)
        return self.actor(h), self.critic(h)[..., 0], state


def loop_with_resets(layer: nn.Module, x: Tensor, state: Any, resets: Tensor) -> Any:
    """What --compare's layer of torch.nn needs: a call for each step, its state set to zero
    between."""
    found = []
    for now, reset in zip(x, resets):
        kept = ~reset[None, :, None]
        if isinstance(state, tuple):
            state = tuple(s * kept for s in state)
        elif state is not None:
            state = state * kept
        h, state = layer(now[None], state)
        found.append(h)
    return torch.cat(found), state


class Window(NamedTuple):
    """Some steps of all mazes. seen [T, B, OBSERVATIONS]; resets, actions, advantages and returns
    [T, B]; the state before the first step."""

    seen: Tensor
    resets: Tensor
    actions: Tensor
    advantages: Tensor
    returns: Tensor
    state: Any


class Player:
    """Plays with the policy as it is at the time, a window after the other; `won` has the share of
    episodes that ended at the goal, of each window."""

    def __init__(self, policy: Policy, options: argparse.Namespace) -> None:
        self.policy = policy
        self.maze = TMaze(options.batch, options.corridor, options.seed)
        self.options = options
        self.won: list[float] = []
        self.state: Any = None
        self.resets = torch.ones(options.batch, dtype=torch.bool)

    @torch.no_grad()
    def windows(self) -> Iterator[Window]:
        device = self.options.device
        while True:
            before = self.state
            rows = []
            ends = goals = 0
            for _ in range(self.options.window):
                seen = torch.from_numpy(self.maze.observe())
                scores, values, self.state = self.policy(
                    seen[None].to(device), self.state, self.resets[None].to(device)
                )
                actions = torch.distributions.Categorical(logits=scores[0]).sample().cpu()
                reward, ended, won = self.maze.step(actions.numpy())
                rows.append((seen, self.resets, actions, torch.from_numpy(reward), values[0].cpu()))
                self.resets = torch.from_numpy(ended)
                ends += int(ended.sum())
                goals += int(won.sum())
            self.won.append(goals / max(ends, 1))
            seen, resets, actions, rewards, values = (torch.stack(column) for column in zip(*rows))
            returns = self.returns_of(rewards, resets)
            window = [seen, resets, actions, returns - values, returns]
            seen, resets, actions, advantages, returns = (t.to(device) for t in window)
            yield Window(seen, resets, actions, advantages, returns, before)

    def returns_of(self, rewards: Tensor, resets: Tensor) -> Tensor:
        """Discounted sums of the rewards until an episode's end, or until the window's, where the
        critic's value stands for the rest."""
        seen = torch.from_numpy(self.maze.observe())[None].to(self.options.device)
        _, value, _ = self.policy(seen, self.state, self.resets[None].to(self.options.device))
        total = value[0].cpu()
        ends = [*resets[1:], self.resets]
        found = []
        for reward, ended in zip(rewards.flip(0), ends[::-1]):
            total = reward + DISCOUNT * total * ~ended
            found.append(total)
        return torch.stack(found[::-1])


def loss(policy: nn.Module, window: Window) -> Tensor:
    scores, values, _ = policy(window.seen, window.state, window.resets)
    chosen = torch.distributions.Categorical(logits=scores)
    gain = (chosen.log_prob(window.actions) * window.advantages).mean()
    surprise = (values - window.returns).square().mean()
    return 0.5 * surprise - gain - 0.01 * chosen.entropy().mean()


@torch.no_grad()
def test(policy: Policy, corridor: int, options: argparse.Namespace) -> float:
    """The share of 500 episodes that end at the goal, with the best action in each step."""
    maze = TMaze(500, corridor, options.seed + 1)
    state = None
    resets = torch.ones(500, dtype=torch.bool, device=options.device)
    first = np.ones(500, dtype=bool)
    goals = 0
    for _ in range(PATIENCE * (corridor + 1)):
        seen = torch.from_numpy(maze.observe()).to(options.device)
        scores, _, state = policy(seen[None], state, resets[None])
        _, ended, won = maze.step(scores[0].argmax(1).cpu().numpy())
        goals += int((won & first).sum())
        first &= ~ended
        resets = torch.from_numpy(ended).to(options.device)
    return goals / 500


@torch.no_grad()
def walk(policy: Policy, goal: int, length: int, device: str) -> Tensor:
    """The outputs [T, hidden] on the way to a junction where `goal` is right."""
    seen = torch.zeros(length + 1, 1, OBSERVATIONS, device=device)
    seen[:length, :, 2] = 1
    seen[length, :, 3] = 1
    seen[0, :, goal - LEFT] = 1
    resets = torch.zeros(length + 1, 1, dtype=torch.bool, device=device)
    return policy.rnn(seen, None, resets=resets)[0][:, 0].cpu()


def draw(path: Path, players: dict[str, Player], policy: Policy, corridor: int) -> None:
    """How often the goal is reached; what the units do on the way."""
    pyplot = training.pyplot()
    figure = pyplot.figure(figsize=(8, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    above = figure.add_subplot(grid[0, :])
    for name, player in players.items():
        smooth = torch.tensor(player.won).unfold(0, 10, 5).mean(1)
        above.plot(range(0, 5 * len(smooth), 5), smooth, label=name)
    above.axhline(0.5, color="gray", linestyle=":", label="guessing")
    above.set(xlabel="training step", ylabel="episodes that end at the goal", ylim=(0, 1.02))
    above.legend()
    ways = [walk(policy, goal, corridor, policy.actor.weight.device.type) for goal in (LEFT, RIGHT)]
    # Those units come first whose outputs at the junction differ most
    order = (ways[0][-1] - ways[1][-1]).argsort()
    for n, (way, name) in enumerate(zip(ways, ("left", "right"))):
        axes = figure.add_subplot(grid[1, n])
        axes.imshow(way[:, order].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
        axes.set(xlabel="step", ylabel="unit", title=f"Outputs h after the light said {name}")
    figure.savefig(path, dpi=100)
    print(f"Success in training, and the memory: {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="gru", steps=500, rate=5e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=32, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=64, help="mazes at once (default: %(default)s)")
    option("--window", type=positive, default=32, help="steps of a window (default: %(default)s)")
    option("--corridor", type=positive, default=12, help="its longest (default: %(default)s)")
    quick = {"steps": 20, "window": 16, "corridor": 4, "batch": 16}
    options = training.parse(parser, arguments, **quick)
    if options.data is not None:
        training.fail("--data: this example makes its mazes itself")
    if options.corridor < 2:
        training.fail("--corridor 1: 2 fields are needed")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    training.print_source("a T-maze simulated by this program", "none needed")
    layer = training.layer(options.cell)
    policies = {
        "without memory": Policy(layer, options.hidden, memory=False),
        f"rnn.{options.cell.upper()}": Policy(layer, options.hidden, memory=True),
    }
    players = {}
    rows = []
    for name, policy in policies.items():
        player = Player(policy.to(options.device), options)
        runs = training.train(policy, loss, player.windows(), options)
        training.print_comparison(runs)
        players[name] = player
        lengths = (options.corridor, 4 * options.corridor)
        rows.append((name, *(f"{test(policy, length, options):.1%}" for length in lengths)))
    columns = [f"corridor of {options.corridor}", f"of {4 * options.corridor}, never seen"]
    training.print_table("episodes that end at the goal", columns, rows)
    draw(options.out / "maze.png", players, policy, options.corridor)


if __name__ == "__main__":
    main()
