"""The command line: see the package."""

from experiments.common.command_line import main
from experiments.speech_recognition.config import SpeechRecognition
from experiments.speech_recognition.study import predict, run

main(run, SpeechRecognition, predict)
