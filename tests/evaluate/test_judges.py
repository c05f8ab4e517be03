import http.server
import json
import threading

import pytest

from qlora_jax.evaluate.judges import by_endpoint, by_likelihood, verdict
from qlora_jax.runtime.errors import UserError


def test_the_likelier_answer_per_token_wins():
    known = {"long": (-10.0, 10), "short": (-3.0, 2), "same": (-1.0, 1), "none": (0.0, 0)}
    judge = by_likelihood(lambda prompt, answer: known[answer])
    assert judge("p", "long", "short") == 1.0  # -1 per token against -1.5
    assert judge("p", "short", "long") == 0.0
    assert judge("p", "long", "same") == 0.5
    assert judge("p", "none", "short") == 0.0
    assert judge("p", "none", "none") == 0.5
    tolerant = by_likelihood(lambda prompt, answer: known[answer], tie=0.6)
    assert tolerant("p", "long", "short") == 0.5


@pytest.mark.parametrize(
    ("reply", "score"),
    [("A is right.\n[A]", 1.0), ("[A] was better, but\n[B]", 0.0), ("Both.\n[equal]", 0.5)],
)
def test_the_last_verdict_counts(reply, score):
    assert verdict(reply) == score


def test_a_reply_without_a_verdict_is_refused():
    with pytest.raises(UserError, match="none of"):
        verdict("I cannot say")


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A server whose judge prefers the answer `right`; it fails for the model `broken`."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if request["model"] == "broken":
            self.send_response(400)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        text = request["messages"][-1]["content"]
        winner = "A" if "right" in text.split("Answer B:")[0] else "B"
        message = {"role": "assistant", "content": f"Clear.\n[{winner}]"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_judge_behind_an_endpoint():
    pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        judge = by_endpoint(url, "m")
        assert judge("p", "right", "other") == 1.0
        assert judge("p", "other", "right") == 0.0
        with pytest.raises(UserError, match="the judge broken failed"):
            by_endpoint(url, "broken")("p", "x", "y")
    finally:
        server.shutdown()
        server.server_close()
