"""`shardrun lesson check --show`: the messages that an attempt sent, beside the solution's, as a picture.

recorder.py    on a rank: what is sent, waited for and computed, a line of JSON for each event
read.py        those lines, and which call of the learner's function is shown
moments.py     an order of all ranks' events: the columns of the picture
drawn.py       as text for the terminal and as SVG
shown.py       what `check` does with all of it
"""
