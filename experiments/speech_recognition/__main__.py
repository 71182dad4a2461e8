"""Entry point of ``python -m experiments.speech_recognition``."""

from experiments.common.command_line import main
from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.study import predict, run

main(run, SpeechRecognition, predict)
