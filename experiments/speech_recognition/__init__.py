"""Speech recognition: adapt Whisper to an accent from minutes of speech.

``before`` is Whisper base as it is; ``transfer`` trains LoRA on its queries and values (Hu et al. 2021,
https://arxiv.org/abs/2106.09685) on clips of the accent; ``scratch`` trains the same architecture from random weights
on the same clips for as many updates. Speakers and sentences of the test split are not those of training. The speech is
synthesised by eSpeak NG.

    python -m experiments.speech_recognition --out runs/speech_recognition
    python -m experiments.speech_recognition --out runs/speech_recognition --predict recordings

The second command transcribes a WAV file, or those in a folder, with the adapter that the first left in
``OUT/adapter``. Your own recordings: ``--data FOLDER`` with WAV files and a ``metadata.csv`` of ``file_name`` and
``text``; public data: ``--data tfds:librispeech``. A Wav2Vec2 or HuBERT with a CTC head works too.
"""

from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.study import run

__all__ = ["SpeechRecognition", "run"]
