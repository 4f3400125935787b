"""What an operator, a dashboard or an LLM server asks of federations: one method a call."""

from collections.abc import Iterator, Sequence

from fedmkt.calls import Calls, all_items, from_cursor, once
from fedmkt.protocol import (
    AdapterPage,
    AdapterRollback,
    AdapterView,
    AuditHead,
    AuditPage,
    EnrolmentToken,
    EnrolmentTokenRequest,
    EventPage,
    FederationConfig,
    FederationPage,
    FederationView,
    LlmRegistration,
    PublicSetReceipt,
    RoundPage,
    RoundRequest,
    RoundView,
    WebhookCreated,
    WebhookPage,
    WebhookRequest,
    WebhookTrial,
)


class OperatorCalls(Calls):
    # ------------------------------------------------------------------------------------------ audit log

    def audit(self, cursor: str | None = None) -> AuditPage:
        return self._read(AuditPage, self._send("GET", "/v1/audit", params={**from_cursor(cursor), "limit": 1000}))

    def audit_head(self) -> AuditHead:
        return self._read(AuditHead, self._send("GET", "/v1/audit/head"))

    # ------------------------------------------------------------------------------------------ federations

    def create_federation(self, config: FederationConfig) -> FederationView:
        return self._read(FederationView, self._send("POST", "/v1/federations", body=config, headers=once()))

    def federation(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("GET", f"/v1/federations/{federation_id}"))

    def federations(self) -> Iterator[FederationView]:
        """All that this credential may see, page by page."""
        return all_items(self._federation_page)

    def _federation_page(self, cursor: str | None) -> FederationPage:
        return self._read(FederationPage, self._send("GET", "/v1/federations", params=from_cursor(cursor)))

    def put_public_set(self, federation_id: str, jsonl: bytes) -> PublicSetReceipt:
        headers = {"Content-Type": "application/jsonl"}
        answer = self._send("PUT", f"/v1/federations/{federation_id}/public-set", body=jsonl, headers=headers)
        return self._read(PublicSetReceipt, answer)

    def issue_enrolment_token(self, federation_id: str, site: str) -> EnrolmentToken:
        path = f"/v1/federations/{federation_id}/enrolment-tokens"
        return self._read(EnrolmentToken, self._send("POST", path, body=EnrolmentTokenRequest(site=site)))

    def revoke_site(self, federation_id: str, site: str) -> None:
        """From now on none of the site's credentials works."""
        self._send("POST", f"/v1/federations/{federation_id}/sites/{site}/revoke")

    def register_llm(self, federation_id: str, registration: LlmRegistration) -> FederationView:
        answer = self._send("PUT", f"/v1/federations/{federation_id}/llm", body=registration)
        return self._read(FederationView, answer)

    def adapters(self, federation_id: str, cursor: str | None = None) -> AdapterPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/adapters", params=from_cursor(cursor))
        return self._read(AdapterPage, answer)

    def adapter(self, federation_id: str, version: int) -> AdapterView:
        return self._read(AdapterView, self._send("GET", f"/v1/federations/{federation_id}/adapters/{version}"))

    def promote_adapter(self, federation_id: str, version: int) -> AdapterView:
        path = f"/v1/federations/{federation_id}/adapters/{version}/promote"
        return self._read(AdapterView, self._send("POST", path))

    def roll_back_adapter(self, federation_id: str, version: int, to_version: int | None = None) -> AdapterView:
        """From `version`, which is promoted, to its parent or `to_version`; the version that is promoted now."""
        path = f"/v1/federations/{federation_id}/adapters/{version}/rollback"
        return self._read(AdapterView, self._send("POST", path, body=AdapterRollback(to_version=to_version)))

    # ------------------------------------------------------------------------------------------ rounds

    def request_rounds(
        self, federation_id: str, count: int | None = None, every_s: float | None = None
    ) -> FederationView:
        """`count` rounds (one, if None) one after the other; with `every_s` a schedule, endless if `count` is None."""
        path = f"/v1/federations/{federation_id}/rounds"
        wanted = RoundRequest(count=count, every_s=every_s)
        return self._read(FederationView, self._send("POST", path, body=wanted, headers=once()))

    def pause_rounds(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/pause"))

    def resume_rounds(self, federation_id: str) -> FederationView:
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/resume"))

    def cancel_rounds(self, federation_id: str) -> FederationView:
        """The running round, those asked for and the schedule."""
        return self._read(FederationView, self._send("POST", f"/v1/federations/{federation_id}/rounds/cancel"))

    def rounds(self, federation_id: str, cursor: str | None = None) -> RoundPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/rounds", params=from_cursor(cursor))
        return self._read(RoundPage, answer)

    def round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("GET", f"/v1/rounds/{round_id}"))

    def cancel_round(self, round_id: str) -> RoundView:
        return self._read(RoundView, self._send("POST", f"/v1/rounds/{round_id}/cancel"))

    def events(self, federation_id: str, cursor: str | None = None, *, after: int = 0) -> EventPage:
        """Page by page with `cursor`; what has happened since the event of sequence `after`. Live: `event_stream`."""
        params: dict[str, str | int] = {**from_cursor(cursor), "after": after}
        return self._read(EventPage, self._send("GET", f"/v1/federations/{federation_id}/events", params=params))

    # ------------------------------------------------------------------------------------------ webhooks

    def create_webhook(self, federation_id: str, url: str, kinds: Sequence[str] = ()) -> WebhookCreated:
        """Send events (of these kinds, or all) to `url` from now on; the secret in the answer signs them."""
        wanted = WebhookRequest(url=url, kinds=tuple(kinds))
        return self._read(WebhookCreated, self._send("POST", f"/v1/federations/{federation_id}/webhooks", body=wanted))

    def webhooks(self, federation_id: str, cursor: str | None = None) -> WebhookPage:
        answer = self._send("GET", f"/v1/federations/{federation_id}/webhooks", params=from_cursor(cursor))
        return self._read(WebhookPage, answer)

    def delete_webhook(self, federation_id: str, webhook_id: str) -> None:
        self._send("DELETE", f"/v1/federations/{federation_id}/webhooks/{webhook_id}")

    def test_webhook(self, federation_id: str, webhook_id: str) -> WebhookTrial:
        """Send one message now; whether it was delivered is in the answer."""
        answer = self._send("POST", f"/v1/federations/{federation_id}/webhooks/{webhook_id}/test")
        return self._read(WebhookTrial, answer)
