"""What the site does not do now because its own policy says so: no failure, and the round goes on by its quorum."""

from fedmkt.errors import Refusal
from fedmkt_client_agent.states import CODES, State


class Withheld(Refusal):
    """Its state is shown until the policy allows it, or the round is over."""

    status = 403
    code = "policy.withheld"
    title = "The site's policy does not allow it"
    remedy = "The policy file says what is allowed; a site that wants more changes it, nobody else can."

    @property
    def state(self) -> State:
        return CODES[self.code]


class OutsideHours(Withheld):
    code = "policy.outside_hours"
    title = "Outside the hours that the site allows"
    remedy = "Nothing: the agent goes on when the hours begin, if the round lasts until then."


class NotApproved(Withheld):
    code = "policy.not_approved"
    title = "Nobody has approved the round"
    remedy = "`fedmkt knowledge inspect --pending`, then `fedmkt agent approve --round N`."


class OverBudget(Withheld):
    code = "policy.over_budget"
    title = "More than the site allows would be sent"
    remedy = "Raise the limit that the message names in the policy file, or let the round go on without the site."


class AdapterForbidden(Withheld):
    code = "policy.send_adapter"
    title = "The site sends no weights"
    remedy = "Set send_adapter = true in the policy file, or ask the operator for a federation without averaging."
