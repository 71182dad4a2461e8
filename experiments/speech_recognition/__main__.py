"""The command line: see the package."""

from experiments.common.command_line import cli
from experiments.speech_recognition.study import SpeechRecognition, main

cli(main, SpeechRecognition)
