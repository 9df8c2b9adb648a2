"""Other right solutions of lesson 9, differently built: the check must pass them."""

import math

from lessons.checking import right_attempt


@right_attempt("choose")
def by_sorting(memory, sent, room):
    for name in sorted(memory, key=lambda name: (sent[name], memory[name], name)):
        if memory[name] <= room:
            return name
    return None


@right_attempt("worst_difference")
def step_by_step(losses):
    names = list(losses)
    worst = (names[1], 1, -1.0)
    for name in names[1:]:
        for step in range(len(losses[name])):
            loss, reference = losses[name][step], losses[names[0]][step]
            apart = math.inf if loss != loss else math.fabs(loss / reference - 1)
            if apart > worst[2]:
                worst = (name, step + 1, apart)
    return worst
