"""Tasks: for each its loss, metrics and decoding."""

from jtl.tasks.answers import answer_f1, exact_match
from jtl.tasks.average_precision import average_precision
from jtl.tasks.beams import Beams, beam_search
from jtl.tasks.causal import CausalLM
from jtl.tasks.classify import Classify, accuracy, confusion, expected_calibration_error, macro_f1
from jtl.tasks.ctc import CTC
from jtl.tasks.detect import Detect, Detections
from jtl.tasks.erasure import erasure, occlusion
from jtl.tasks.flow_matching import FlowMatching
from jtl.tasks.frechet import diversity, frechet_distance, kernel_distance
from jtl.tasks.generate import generate, stream, stream_text
from jtl.tasks.masked import MaskedLM, mask, masked_head
from jtl.tasks.segment import Dice, Segment, pixel_confusion, segmentation_scores
from jtl.tasks.seq2seq import Seq2Seq, teacher_forcing
from jtl.tasks.spans import Found, Spans, best_spans, find_spans, span_head
from jtl.tasks.transcribe import detect_language, transcribe
from jtl.tasks.transcribe_long import transcribe_long
from jtl.tasks.words import word_error_rate
from jtl.tasks.zero_shot import class_embeddings, zero_shot

__all__ = [
    "Beams", "CTC", "CausalLM", "Classify", "Detect", "Detections", "Dice", "FlowMatching", "Found",
    "MaskedLM", "Segment", "Seq2Seq", "Spans", "accuracy", "answer_f1", "average_precision", "beam_search",
    "best_spans", "class_embeddings", "confusion", "ctc", "detect", "detect_language", "diversity", "erasure",
    "exact_match", "expected_calibration_error", "find_spans", "flow_matching", "frechet_distance",
    "generate", "kernel_distance", "macro_f1", "mask", "masked_head", "occlusion", "pixel_confusion",
    "segmentation_scores", "span_head", "stream", "stream_text", "teacher_forcing", "transcribe", "transcribe_long",
    "word_error_rate", "zero_shot",
]  # fmt: skip
