"""Music: fine-tune a small decoder on a few Bach chorales, after pretraining on fiddle tunes and folk songs.

``transfer`` fine-tunes the pretrained decoder on ``--train-pieces`` chorales; ``scratch`` trains the same architecture
from random weights on the same chorales for as many updates; ``before`` is the pretrained model as it is, ``real`` are
the test chorales themselves. The best of five validations is kept, and tested once.

    python -m experiments.music --out runs/music
    python -m experiments.music --out runs/music --predict 3

The second command writes three new pieces with the model that the first left in ``OUT/model``, each as MIDI, WAV and a
piano roll. Your own music: ``--data FOLDER`` of MIDI files.
"""

from experiments.music.config import Music
from experiments.music.study import run

__all__ = ["Music", "run"]
