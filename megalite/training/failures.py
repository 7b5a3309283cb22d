"""What a failure means: errors that a message explains, and errors of lost contact."""

import re
import traceback

from megalite.system.errors import ReportedError, error_message
from megalite.watch.watchdog import LostContact, Watchdog


def explain(error: Exception) -> str | None:
    """The message to show in place of a traceback; None where the traceback is needed."""
    if isinstance(error, (ReportedError, OSError)):
        return error_message(error)
    if _lost_contact(error):  # within a run it is a LostContact already
        return f"could not meet the other ranks: {str(error).splitlines()[0]}"
    return None


def as_lost_contact(error: Exception, watchdog: Watchdog) -> Exception | None:
    """The LostContact to raise in place of an error of the run, or None where the error is this
    rank's own and is reported here.

    Tells the other ranks, through the watchdog, why this one ends. The message of the LostContact
    says which rank failed and why; it is empty where another rank has reported the cause.
    """
    if _lost_contact(error):
        return LostContact(_why_contact_was_lost(error, watchdog))
    message = explain(error)
    if message is None:
        message = "".join(traceback.format_exception_only(error)).strip()
    return LostContact() if watchdog.report_failure(message) else None


def _lost_contact(error: Exception) -> bool:
    """Whether the error says only that another rank is gone.

    gloo raises plain RuntimeErrors, whose messages begin with the name of its source file.
    """
    return type(error).__module__ == "torch.distributed" or "gloo/transport" in str(error)


def _why_contact_was_lost(error: Exception, watchdog: Watchdog) -> str:
    """Which rank failed and why, and the call in which this rank noticed; "" if another says so."""
    cause = watchdog.why_contact_was_lost()
    if not cause:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    functions = [frame.name for frame in frames if "/torch/" not in frame.filename]
    reason = re.sub(r"^\[.*?\.cc:\d+\] |\. This is .*", "", str(error).splitlines()[0])
    return f"{cause}\n  (contact was lost in {' > '.join(functions[-2:])}: {reason})"
