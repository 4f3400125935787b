{{- define "fedmkt.name" -}}
{{- if contains "fedmkt" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-fedmkt" (.Release.Name | trunc 33 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "fedmkt.selector" -}}
app.kubernetes.io/name: fedmkt
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fedmkt.labels" -}}
{{ include "fedmkt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* What every pod has: no account token, no service links (they would set FEDMKT_PORT and the like), no root. */}}
{{- define "fedmkt.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "fedmkt.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The coordinator's secrets as files named like its settings, readable by its group alone. */}}
{{- define "fedmkt.secrets" -}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ .Values.database.existingSecret }}
          items: [{key: {{ .Values.database.key | quote }}, path: fedmkt_database_url}]
      - secret:
          name: {{ .Values.redis.existingSecret }}
          items: [{key: {{ .Values.redis.key | quote }}, path: fedmkt_redis_url}]
      - secret:
          name: {{ .Values.tokens.existingSecret }}
          items:
            - {key: {{ .Values.tokens.operatorKey | quote }}, path: fedmkt_operator_token}
            - {key: {{ .Values.tokens.viewerKey | quote }}, path: fedmkt_viewer_token}
            - {key: {{ .Values.tokens.workerKey | quote }}, path: fedmkt_worker_token}
{{- end }}

{{- define "fedmkt.env" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
